"""The random token trees and the budgets of the study, from its parameters."""

import numpy as np
import torch
from torch import Tensor

from replication.theory.tabular import Trees, enumerate_paths, random_trees


def make_trees(parameters: dict, number: int, stream: int, shape: tuple[int, int, bool] | None = None) -> Trees:
    """`number` random trees; streams are independent of each other, and of how many trees another one has.

    Args:
        shape: vocabulary, depth, and whether a token ends a sequence early; as the parameters say where not given.
    """
    tree = parameters["tree"]
    paths = enumerate_paths(*(shape or (tree["vocab"], tree["depth"], True)))
    return random_trees(number, paths, tree["sharpness"], tree["success"], generator(parameters, stream))


def held_out_trees(parameters: dict) -> Trees:
    """The trees on which the optimum is computed and the learners are judged."""
    return make_trees(parameters, parameters["learners"]["test_trees"], stream=1)


def generator(parameters: dict, stream: int) -> torch.Generator:
    seed = np.random.SeedSequence([parameters["seed"], stream]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


def budget_grid(parameters: dict, limit: float, levels: int | None = None) -> np.ndarray:
    """Budgets from 0 to `limit`, closer to each other near 0, where V(s, z) rises like a square root."""
    return limit * np.linspace(0, 1, levels or parameters["grid"]["levels"]) ** parameters["grid"]["power"]


def constant(value: float, number: int) -> Tensor:
    return torch.full((number,), value, dtype=torch.float64)
