"""The gradient formula (method, section 4 (c)) away from the budget, and what J~ does where a trajectory crosses it."""

import numpy as np
import pandas as pd
import torch
from scipy.integrate import cumulative_trapezoid
from torch import Tensor

from replication.theory import FORMS
from replication.theory.tabular import Trees, modified_gradient, modified_objective, repeat, sequences, soft_optimum
from replication.theory.trees import constant, generator, make_trees


def gradient(parameters: dict) -> dict[str, pd.DataFrame]:
    """Section 4 (c): the formula against central differences in random directions, at random policies."""
    settings = parameters["gradient"]
    trees = make_trees(parameters, settings["trees"], stream=6)
    source = generator(parameters, 7)
    logits = trees.teacher + torch.randn(trees.teacher.shape, generator=source, dtype=torch.float64)
    direction = torch.randn(trees.teacher.shape, generator=source, dtype=torch.float64)
    budget, step = constant(settings["budget"], len(logits)), settings["step"]
    strengths = {"lam": settings["lambda"], "penalty": settings["penalty"]}
    ends = logits + step * direction, logits - step * direction
    crossed = (over(trees, ends[0], budget) != over(trees, ends[1], budget)).any(1)
    tables = []
    for form in FORMS:
        formula = (modified_gradient(trees, logits, budget, form, **strengths) * direction).sum((1, 2))
        ahead, behind = (modified_objective(trees, end, budget, form, **strengths) for end in ends)
        difference = (ahead - behind) / (2 * step)
        columns = {"form": form, "tree": range(len(logits)), "formula": formula, "difference": difference}
        columns |= {"error": formula - difference, "crossing": crossed}
        tables.append(pd.DataFrame(columns))
    return {"gradient": pd.concat(tables)}


def jump(parameters: dict) -> dict[str, pd.DataFrame]:
    """J~ along a line from the teacher towards the reward, and what integrating the formula of (c) makes of it."""
    settings = parameters["jump"]
    tree = make_trees(parameters, 1, stream=8)
    target = soft_optimum(tree, constant(settings["soft_lambda"], 1))
    budget = settings["budget"]

    def along(position: np.ndarray) -> tuple[Trees, Tensor, Tensor]:
        logits = torch.lerp(tree.teacher, target, torch.from_numpy(position)[:, None, None])
        return repeat(tree, len(position)), logits, constant(budget, len(position))

    position = np.linspace(0, 1, settings["points"])
    line = {"position": position}
    trees, logits, limits = along(position)
    for form in FORMS:
        value = modified_objective(trees, logits, limits, form, lam=settings["lambda"]).numpy()
        slope = modified_gradient(trees, logits, limits, form, lam=settings["lambda"])
        slope = (slope * (target - tree.teacher)).sum((1, 2)).numpy()
        line[form] = value
        line[f"{form}_integrated"] = value[0] + cumulative_trapezoid(slope, position, initial=0)

    # each crossing, by bisection on the signature, and the jump across it
    rows = []
    signature = over(trees, logits, limits)
    for index in (signature[1:] != signature[:-1]).any(1).nonzero()[:, 0].tolist():
        left, right = position[index], position[index + 1]
        while right - left > 1e-12:
            middle = (left + right) / 2
            before, there = over(*along(np.array([left, middle])))
            left, right = (middle, right) if torch.equal(before, there) else (left, middle)
        trees, logits, limits = along(np.array([left, right]))
        for form in FORMS:
            below, above = modified_objective(trees, logits, limits, form, lam=settings["lambda"]).tolist()
            expected = expected_jump(trees, logits, limits, form, settings["lambda"])
            rows.append((form, left, above - below, expected, above - below - expected))
    crossed = pd.DataFrame(rows, columns=["form", "position", "jump", "expected", "error"])
    return {"jump_line": pd.DataFrame(line), "jump_crossings": crossed}


def expected_jump(trees: Trees, logits: Tensor, budget: Tensor, form: str, lam: float) -> float:
    """What a crossing costs, row 0 before it and row 1 after it.

    A sequence that crosses at its last costly step forfeits R (not in the hinge form). In section 3's form it is also
    charged lam Phi of the whole crossing step, at once: the step's cost, not the excess.
    """
    seq = sequences(trees, logits)
    late = over(trees, logits, budget).view(seq.cost.shape)
    lost = trees.reward[1] * (late[1, :, -1] & ~late[0, :, -1]) if form != "hinge" else 0.0
    charged = lam * ((late[1] & ~late[0]) * seq.cost[1]).sum(-1) if form == "exhausted" else 0.0
    return -float((seq.prob[1] * (lost + charged)).sum())


def over(trees: Trees, logits: Tensor, budget: Tensor) -> Tensor:
    """Which steps are over the budget, (N, L H): a signature that changes exactly where a trajectory crosses it."""
    return (sequences(trees, logits).cost.cumsum(-1) > budget[:, None, None]).flatten(1)
