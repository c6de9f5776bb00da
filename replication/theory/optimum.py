"""The exact optimum under the budget, next to the soft Lagrangian's (method, section 5): its bracket, how that closes,
what it takes to compute, and a tree small enough to draw."""

import time
import tracemalloc

import numpy as np
import pandas as pd
import torch

from cmdp.divergence import divergence_from_logits
from replication.theory.tabular import (
    Trees,
    budgeted_policy,
    budgeted_values,
    outcome,
    repeat,
    soft_optimum,
    soft_values,
)
from replication.theory.trees import budget_grid, constant, held_out_trees, make_trees


def optimum(parameters: dict) -> dict[str, pd.DataFrame]:
    """The bracket of V(s_0, d), the policy that attains its lower end, and the best soft Lagrangian, tree by tree."""
    trees = held_out_trees(parameters)
    number = len(trees.reward)
    lambdas = np.geomspace(*parameters["soft_lambdas"])
    tables = []
    for budget in parameters["budgets"]:
        grid = budget_grid(parameters, budget)
        lower, upper = (budgeted_values(trees, grid, bound) for bound in ("lower", "upper"))
        attained = budgeted_policy(trees, grid, lower, len(grid) - 1)
        found = outcome(trees, attained.logits, constant(budget, number))
        columns = {
            "tree": np.arange(number),
            "budget": budget,
            "lower": lower[:, 0, -1],
            "upper": upper[:, 0, -1],
            "policy_error": found["reward"].numpy() - lower[:, 0, -1],  # 0 but for rounding
            "policy_violation": found["violation"].numpy(),
            "first": found["first"].numpy(),
            "price": attained.price[:, 0],
            "teacher": outcome(trees, trees.teacher, constant(budget, number))["reward"].numpy(),
            "unlimited": soft_values(trees, constant(1e-9, number))[:, 0].numpy(),
        }
        tables.append(pd.DataFrame(columns | best_soft(trees, budget, lambdas)))

    points = parameters["frontier"]
    grid = budget_grid(parameters, points["limit"])
    values = budgeted_values(trees, grid)[:, 0].mean(0)
    chosen = np.linspace(0, len(grid) - 1, points["points"]).astype(int)[1:]
    soft = [best_soft(trees, grid[j], lambdas) for j in chosen]
    frontier = {"budget": grid[chosen], "optimum": values[chosen]}
    frontier |= {name: [found[name].mean() for found in soft] for name in soft[0]}
    return {"optimum": pd.concat(tables), "frontier": pd.DataFrame(frontier)}


def best_soft(trees: Trees, budget: float, lambdas: np.ndarray) -> dict[str, np.ndarray]:
    """The soft Lagrangian's optimum at each tree's own best lambda, under three readings of the constraint.

    Returns:
        For `never` (no sequence violates), `rarely` (5 % may) and `on_average` (E[C] <= d): the reward, and the share
        that violates; (N,) each. The teacher (lambda infinite) is always admissible.
    """
    number, count = len(trees.reward), len(lambdas)
    many = repeat(trees, count)
    found = outcome(
        many, soft_optimum(many, torch.from_numpy(lambdas).repeat(number)), constant(budget, number * count)
    )
    found = {name: value.view(number, count).numpy() for name, value in found.items()}
    teacher = outcome(trees, trees.teacher, constant(budget, number))["reward"].numpy()
    result = {}
    for name, admissible in (
        ("never", found["violation"] <= 1e-12),
        ("rarely", found["violation"] <= 0.05),
        ("on_average", found["cost"] <= budget),
    ):
        reward = np.where(admissible, found["reward"], -np.inf)
        best, rows = reward.argmax(1), np.arange(number)
        none = ~admissible.any(1)
        result[f"soft_{name}"] = np.where(none, teacher, reward[rows, best])
        result[f"soft_{name}_violation"] = np.where(none, 0.0, found["violation"][rows, best])
    return result


def refinement(parameters: dict) -> dict[str, pd.DataFrame]:
    """How the bracket closes as the grid of budgets is refined."""
    settings = parameters["refinement"]
    trees = make_trees(parameters, settings["trees"], stream=2)
    rows = []
    for budget in parameters["budgets"]:
        for levels in settings["levels"]:
            grid = budget_grid(parameters, budget, levels)
            lower, upper = (budgeted_values(trees, grid, bound)[:, 0, -1] for bound in ("lower", "upper"))
            rows += [(budget, levels, tree, *both) for tree, both in enumerate(zip(lower, upper, strict=True))]
    return {"refinement": pd.DataFrame(rows, columns=["budget", "levels", "tree", "lower", "upper"])}


def timing(parameters: dict) -> dict[str, pd.DataFrame]:
    """Seconds and peak memory of one dynamic program as V, H and the grid of budgets grow. No seed decides those: this
    is the one file of the study that differs from run to run."""
    rows = []
    for vocab, depth, levels in parameters["timing"]:
        trees = make_trees(parameters, 1, stream=3, shape=(vocab, depth, False))
        grid = budget_grid(parameters, parameters["budgets"][-1], levels)
        tracemalloc.start()  # NumPy's few and large allocations make this next to free
        start = time.perf_counter()
        budgeted_values(trees, grid)
        seconds = time.perf_counter() - start
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        rows.append((vocab, depth, levels, len(trees.paths.child), len(trees.paths.state), seconds, peak))
    columns = ["vocab", "depth", "levels", "states", "sequences", "seconds", "peak_mib"]
    return {"timing": pd.DataFrame(rows, columns=columns)}


def example(parameters: dict) -> dict[str, pd.DataFrame]:
    """One small tree, state by state and token by token, under the budgeted and the soft optimum of equal mean cost."""
    settings = parameters["example"]
    tree = make_trees(parameters, 1, stream=settings["stream"], shape=tuple(settings["shape"]))
    budget = settings["budget"]
    grid = budget_grid(parameters, budget)
    attained = budgeted_policy(tree, grid, budgeted_values(tree, grid), len(grid) - 1)
    mean = float(outcome(tree, attained.logits, constant(budget, 1))["cost"][0])
    low, high = 1e-3, 1e3
    while high / low > 1 + 1e-9:  # E[C] falls in lambda
        middle = (low * high) ** 0.5
        cost = float(outcome(tree, soft_optimum(tree, constant(middle, 1)), constant(budget, 1))["cost"][0])
        low, high = (middle, high) if cost > mean else (low, middle)
    rows = []
    for name, logits in (("budgeted", attained.logits), ("soft", soft_optimum(tree, constant(high, 1)))):
        policy = logits.softmax(-1)[0]
        cost = divergence_from_logits(logits, tree.teacher)[0]
        spent = torch.zeros(len(policy), dtype=torch.float64)  # before the state's own cost
        for state, children in enumerate(tree.paths.child.tolist()):
            after = float(spent[state] + cost[state])
            for token, child in enumerate(children):
                if child >= 0:
                    spent[child] = after
                reward = float(tree.reward[0, -1 - child]) if child < 0 else np.nan
                here = name, state, int(tree.paths.depth[state]), token, child
                rows.append((*here, float(policy[state, token]), after, reward))
    columns = ["policy", "state", "depth", "token", "child", "probability", "spent", "reward"]
    return {"example": pd.DataFrame(rows, columns=columns).assign(budget=budget)}
