"""The exact optimum under the budget beside the soft Lagrangian's (method, section 5)."""

import time
import tracemalloc

import numpy as np
import pandas as pd
import torch

from replication.theory import trees as exact


def optimum(parameters: dict) -> dict[str, pd.DataFrame]:
    """The bracket of V(s_0, d), the policy that attains its lower end, and the best soft Lagrangian, tree by tree."""
    trees, lambdas = exact.make_trees(parameters), np.geomspace(*parameters["soft_lambdas"])
    tables = []
    for budget in parameters["budgets"]:
        grid = exact.budget_grid(parameters, budget)
        lower, upper = (exact.budgeted_values(trees, grid, bound) for bound in ("lower", "upper"))
        logits, price = exact.budgeted_policy(trees, grid, lower, len(grid) - 1)
        found = exact.outcome(trees, logits, budget)
        columns = {"tree": np.arange(len(price)), "budget": budget, "lower": lower[:, 0, -1], "upper": upper[:, 0, -1]}
        columns["policy_error"] = found["reward"].numpy() - lower[:, 0, -1]  # rounding
        columns |= {"policy_violation": found["violation"], "first": found["first"], "price": price[:, 0]}
        columns["teacher"] = exact.outcome(trees, trees.teacher, budget)["reward"]
        columns["unlimited"] = exact.soft_optimum(trees, 1e-9)[0][:, 0]
        tables.append(pd.DataFrame(columns | best_soft(trees, budget, lambdas)))

    points = parameters["frontier"]
    grid = exact.budget_grid(parameters, points["limit"])
    values = exact.budgeted_values(trees, grid)[:, 0].mean(0)
    chosen = np.linspace(0, len(grid) - 1, points["points"]).astype(int)[1:]
    soft = pd.DataFrame([pd.DataFrame(best_soft(trees, budget, lambdas)).mean() for budget in grid[chosen]])
    frontier = pd.DataFrame({"budget": grid[chosen], "optimum": values[chosen]}).join(soft)
    return {"optimum": pd.concat(tables), "frontier": frontier}


def soft_outcomes(trees: exact.Trees, lambdas: np.ndarray, budget: float) -> dict[str, np.ndarray]:
    """`outcomes` of the soft optimum at each lambda, and of the teacher, which stands last: (N, len(lambdas) + 1)."""
    number, count = len(trees.reward), len(lambdas)
    _, policies = exact.soft_optimum(trees.repeat(count), np.tile(lambdas, number))
    policies = policies.view(number, count, *policies.shape[1:])
    return exact.outcomes(trees, torch.cat([policies, trees.teacher[:, None]], 1), budget)


def best_soft(trees: exact.Trees, budget: float, lambdas: np.ndarray) -> dict[str, np.ndarray]:
    """The soft Lagrangian's optimum at each tree's own best lambda: reward, and probability of a violation; (N,) each.

    The constraint is read in three ways: `never` (no sequence violates), `rarely` (with probability 5 % at most) and
    `on_average` (E[C] <= d). The teacher (lambda infinite) is always admissible.
    """
    found = soft_outcomes(trees, lambdas, budget)
    result = {}
    for name, admissible in (
        ("never", found["violation"] <= 1e-12),
        ("rarely", found["violation"] <= 0.05),
        ("on_average", found["cost"] <= budget),
    ):
        best = np.where(admissible, found["reward"], -np.inf).argmax(1)[:, None]
        result[f"soft_{name}"] = np.take_along_axis(found["reward"], best, 1)[:, 0]
        result[f"soft_{name}_violation"] = np.take_along_axis(found["violation"], best, 1)[:, 0]
    return result


def refinement(parameters: dict) -> dict[str, pd.DataFrame]:
    """How the bracket closes as the grid of budgets is refined."""
    settings, tables = parameters["refinement"], []
    trees = exact.make_trees(parameters, settings["trees"], stream=2)
    for budget in parameters["budgets"]:
        for levels in settings["levels"]:
            grid = exact.budget_grid(parameters, budget, levels)
            columns = {"budget": budget, "levels": levels, "tree": range(settings["trees"])}
            columns |= {end: exact.budgeted_values(trees, grid, end)[:, 0, -1] for end in ("lower", "upper")}
            tables.append(pd.DataFrame(columns))
    return {"refinement": pd.concat(tables)}


def timing(parameters: dict) -> dict[str, pd.DataFrame]:
    """Seconds and peak memory of one dynamic program as V, H and the grid grow. This table differs between runs."""
    rows = []
    for vocab, depth, levels in parameters["timing"]:
        trees = exact.make_trees(parameters, 1, stream=3, shape=(vocab, depth, False))
        grid = exact.budget_grid(parameters, parameters["budgets"][-1], levels)
        tracemalloc.start()  # NumPy's few and large allocations make this next to free
        start = time.perf_counter()
        exact.budgeted_values(trees, grid)
        seconds = time.perf_counter() - start
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        rows.append((vocab, depth, levels, len(trees.paths.child), len(trees.paths.state), seconds, peak))
    columns = ["vocab", "depth", "levels", "states", "sequences", "seconds", "peak_mib"]
    return {"timing": pd.DataFrame(rows, columns=columns)}


def example(parameters: dict) -> dict[str, pd.DataFrame]:
    """One small tree, token by token, under the budgeted and the soft optimum of equal mean cost."""
    settings = parameters["example"]
    tree = exact.make_trees(parameters, 1, stream=settings["stream"], shape=tuple(settings["shape"]))
    budget, vocab = settings["budget"], settings["shape"][0]
    grid = exact.budget_grid(parameters, budget)
    budgeted, _ = exact.budgeted_policy(tree, grid, exact.budgeted_values(tree, grid), len(grid) - 1)
    mean = exact.outcome(tree, budgeted, budget)["cost"]
    low, high = 1e-3, 1e3
    while high / low > 1 + 1e-9:  # E[C] falls in lambda
        middle = (low * high) ** 0.5
        cost = exact.outcome(tree, exact.soft_optimum(tree, middle)[1], budget)["cost"]
        low, high = (middle, high) if cost > mean else (low, middle)
    tables, child = [], tree.paths.child.flatten().numpy()
    for name, logits in (("budgeted", budgeted), ("soft", exact.soft_optimum(tree, high)[1])):
        on, spent = tree.paths.mask != 0, np.empty(len(tree.paths.depth))
        spent[tree.paths.state[on]] = exact.sequences(tree, logits).cost[0].cumsum(-1)[on]
        each = {"state": np.arange(len(spent)), "depth": tree.paths.depth}  # by state, then by token
        columns = {"policy": name} | {column: np.repeat(value, vocab) for column, value in each.items()}
        columns |= {"token": np.tile(np.arange(vocab), len(spent)), "child": child}
        columns |= {"probability": logits.softmax(-1).flatten(), "spent": np.repeat(spent, vocab)}
        columns["reward"] = np.where(child < 0, tree.reward[0].numpy()[-1 - child], np.nan)
        tables.append(pd.DataFrame(columns))
    return {"example": pd.concat(tables).assign(budget=budget)}
