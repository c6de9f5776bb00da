"""The exact optimum under the budget beside the soft Lagrangian's (method, section 5)."""

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq

from replication.theory import Found
from replication.theory import trees as exact


def optimum(parameters: dict) -> Found:
    """The bracket of V(s_0, d), the policy that attains its lower end, and the best soft Lagrangian, tree by tree."""
    trees, lambdas = exact.make_trees(parameters), np.geomspace(*parameters["soft_lambdas"])
    for budget in parameters["budgets"]:
        grid = exact.budget_grid(parameters, budget)
        lower, upper = (exact.budgeted_values(trees, grid, bound) for bound in ("lower", "upper"))
        logits, price = exact.budgeted_policy(trees, grid, lower, len(grid) - 1)
        found = exact.outcome(trees, logits, budget)
        columns = {"tree": range(len(price)), "budget": budget, "lower": lower[:, 0, -1], "upper": upper[:, 0, -1]}
        columns["policy_error"] = found["reward"].numpy() - lower[:, 0, -1]  # rounding
        columns |= {"policy_violation": found["violation"], "first": found["first"], "price": price[:, 0]}
        columns["teacher"] = exact.outcome(trees, trees.teacher, budget)["reward"]
        columns["unlimited"] = exact.soft_optimum(trees, 1e-9)[0][:, 0]
        yield "optimum", pd.DataFrame(columns | best_soft(trees, budget, lambdas))

    grid = exact.budget_grid(parameters, parameters["frontier"]["limit"])
    values = exact.budgeted_values(trees, grid)[:, 0].mean(0)
    chosen = np.linspace(0, len(grid) - 1, parameters["frontier"]["points"]).astype(int)[1:]
    soft = pd.DataFrame([pd.DataFrame(best_soft(trees, budget, lambdas)).mean() for budget in grid[chosen]])
    yield "frontier", pd.DataFrame({"budget": grid[chosen], "optimum": values[chosen]}).join(soft)


def soft_outcomes(trees: exact.Trees, lambdas: np.ndarray, budget: float) -> dict[str, np.ndarray]:
    """`outcomes` of the soft optimum at each lambda, and of the teacher, which stands last: (N, len(lambdas) + 1)."""
    number, count = len(trees.reward), len(lambdas)
    policies = exact.soft_optimum(trees.repeat(count), np.tile(lambdas, number))[1].unflatten(0, (number, count))
    return exact.outcomes(trees, torch.cat([policies, trees.teacher[:, None]], 1), budget)


def best_soft(trees: exact.Trees, budget: float, lambdas: np.ndarray) -> dict[str, np.ndarray]:
    """The soft Lagrangian's optimum at each tree's own best lambda: reward, and probability of a violation; (N,) each.

    The constraint is read in three ways: `never` (no sequence violates), `rarely` (with probability 5 % at most) and
    `on_average` (E[C] <= d). The teacher (lambda infinite) is always admissible.
    """
    found, result = soft_outcomes(trees, lambdas, budget), {}
    never, rarely, on_average = found["violation"] <= 1e-12, found["violation"] <= 0.05, found["cost"] <= budget
    for name, admissible in {"never": never, "rarely": rarely, "on_average": on_average}.items():
        best = np.where(admissible, found["reward"], -np.inf).argmax(1)[:, None]
        for key, measure in ((f"soft_{name}", "reward"), (f"soft_{name}_violation", "violation")):
            result[key] = np.take_along_axis(found[measure], best, 1)[:, 0]
    return result


def refinement(parameters: dict) -> Found:
    """How the bracket closes as the grid of budgets is refined."""
    settings = parameters["refinement"]
    trees = exact.make_trees(parameters, settings["trees"], stream=2)
    for budget in parameters["budgets"]:
        for levels in settings["levels"]:
            grid = exact.budget_grid(parameters, budget, levels)
            columns = {"budget": budget, "levels": levels, "tree": range(settings["trees"])}
            columns |= {end: exact.budgeted_values(trees, grid, end)[:, 0, -1] for end in ("lower", "upper")}
            yield "refinement", pd.DataFrame(columns)


def example(parameters: dict) -> Found:
    """One small tree, token by token, under the budgeted and the soft optimum of equal mean cost."""
    settings = parameters["example"]
    tree = exact.make_trees(parameters, 1, stream=settings["stream"], shape=tuple(settings["shape"]))
    budget, on, child = settings["budget"], tree.paths.mask != 0, tree.paths.child.flatten().numpy()
    grid = exact.budget_grid(parameters, budget)
    budgeted, _ = exact.budgeted_policy(tree, grid, exact.budgeted_values(tree, grid), len(grid) - 1)

    def cost(logits: torch.Tensor) -> float:
        return exact.outcome(tree, logits, budget)["cost"].item()

    mean = cost(budgeted)
    lam = np.exp(brentq(lambda log: cost(exact.soft_optimum(tree, np.exp(log))[1]) - mean, -7, 7))
    state, token = np.indices(tree.paths.child.shape).reshape(2, -1)
    for name, logits in (("budgeted", budgeted), ("soft", exact.soft_optimum(tree, lam)[1])):
        spent = np.empty(len(tree.paths.depth))
        spent[tree.paths.state[on]] = exact.sequences(tree, logits).cost[0].cumsum(-1)[on]
        columns = {"policy": name, "state": state, "depth": tree.paths.depth[state], "token": token, "child": child}
        columns |= {"probability": logits.softmax(-1).flatten(), "spent": spent[state]}
        columns["reward"] = np.where(child < 0, tree.reward[0].numpy()[-1 - child], np.nan)
        yield "example", pd.DataFrame(columns | {"budget": budget})
