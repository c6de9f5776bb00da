"""What a maximiser of the modified reward guarantees (method, section 4 (a) and (b)), and from what lambda on the hinge
form's keeps the budget."""

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import Tensor

from replication.theory.tabular import (
    Trees,
    budgeted_policy,
    budgeted_values,
    enumerate_paths,
    outcome,
    repeat,
    sequences,
    soft_optimum,
    take,
)
from replication.theory.trees import budget_grid, constant, held_out_trees, make_trees


def penalty_bound(parameters: dict) -> dict[str, pd.DataFrame]:
    """Section 4 (a), p <= (1 - J_c) / (1 + n), for three students.

    `any policy`: all policies on a grid that has the teacher's own probabilities, by brute force. `one parameter`: the
    tilts pi_lambda and the teacher, a student that cannot change one state's distribution without the others'.
    `per token`: two tokens, a budget of delta nats a token, the case in which the bound is met with equality.
    """
    settings = parameters["penalty_bound"]
    penalties = np.array(settings["penalties"])
    tables = []

    def record(case: str, within: np.ndarray, violation: np.ndarray) -> None:
        """The maximiser of J~ = E[R 1{C <= d}] - n p among the policies of a row; (N, policies) each."""
        feasible = np.where(violation <= 1e-12, within, -np.inf).max(1)
        for n in penalties:
            value = within - n * violation
            # of equally good policies the one that violates least
            best = np.where(value >= value.max(1, keepdims=True) - 1e-12, violation, np.inf).min(1)
            bound = (1 - feasible) / (1 + n)
            tables.append(pd.DataFrame({"case": case, "tree": range(len(best)), "n": n, "p": best, "bound": bound}))

    # any policy: 2 tokens, 2 steps, 3 states; the teacher's probabilities are moved to the nearest points of the grid
    number, points = settings["trees"], settings["points"]
    trees = make_trees(parameters, number, stream=4, shape=(2, 2, False))
    probability = np.arange(1, points + 1) / (points + 1)
    nearest = probability[np.abs(trees.teacher.exp()[..., :1].numpy() - probability).argmin(-1)]  # (N, S)
    trees = trees._replace(teacher=torch.from_numpy(np.log(np.stack([nearest, 1 - nearest], -1))))
    every = np.stack(np.meshgrid(*[probability] * 3, indexing="ij"), -1).reshape(-1, 3)  # (P, S)
    policies = torch.from_numpy(np.log(np.stack([every, 1 - every], -1)))
    many = repeat(trees, len(policies))
    found = outcome(many, policies.repeat(number, 1, 1), constant(settings["budget"], len(many.reward)))
    record("any policy", *(found[name].view(number, -1).numpy() for name in ("within", "violation")))

    trees = held_out_trees(parameters)
    number, lambdas = len(trees.reward), np.geomspace(*parameters["soft_lambdas"])
    many = repeat(trees, len(lambdas))
    policy = soft_optimum(many, torch.from_numpy(lambdas).repeat(number))
    found = outcome(many, policy, constant(settings["budget"], len(many.reward)))
    teacher = outcome(trees, trees.teacher, constant(settings["budget"], number))
    both = [torch.cat([found[k].view(number, -1), teacher[k][:, None]], 1).numpy() for k in ("within", "violation")]
    record("one parameter", *both)

    record("per token", *(value[None] for value in two_tokens(settings["per_token"], settings["fine"])))
    return {"penalty_bound": pd.concat(tables)}


def two_tokens(per_token: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The tree on which bound (a) is tight: E[R 1{C <= d}] and P(C > d) of `points` policies; (points,) each.

    EOS first earns nothing; anything else earns 1 at the second and last token. The teacher is uniform. The student
    tilts away from EOS, and pays for it at the root, before it is known whether one token or two have been granted.
    """
    paths = enumerate_paths(2, 2)  # token 1 is EOS
    reward = (paths.mask.sum(1) == 2).double()
    teacher = torch.full((points, len(paths.child), 2), 0.5, dtype=torch.float64).log()
    eos = torch.linspace(0, 0.5, points + 1, dtype=torch.float64)[1:]
    policy = teacher.clone()
    policy[:, 0] = torch.stack([1 - eos, eos], -1).log()
    budget = (per_token * paths.mask.sum(1)).double().expand(points, -1)
    found = outcome(Trees(paths, teacher, reward.expand(points, -1)), policy, budget)
    return found["within"].numpy(), found["violation"].numpy()


def augmentation(parameters: dict) -> dict[str, pd.DataFrame]:
    """Section 4 (b): policies that see z, by dynamic programming; policies that do not, by nonlinear programming."""
    settings = parameters["augmentation"]
    trees = make_trees(parameters, settings["trees"], stream=5, shape=tuple(settings["shape"]))
    grid = budget_grid(parameters, settings["budget"])
    lower, upper = (budgeted_values(trees, grid, bound)[:, 0, -1] for bound in ("lower", "upper"))
    rng = np.random.default_rng([parameters["seed"], 5])
    unaware = [
        without_budget(take(trees, slice(row, row + 1)), grid[-1], settings["starts"], rng)
        for row in range(settings["trees"])
    ]
    columns = {"tree": range(len(lower)), "sees_z": lower, "sees_z_upper": upper, "does_not": unaware}
    return {"augmentation": pd.DataFrame(columns)}


def without_budget(tree: Trees, budget: float, starts: int, rng: np.random.Generator) -> float:
    """max E[R] such that C <= d on every sequence, over the logits of a policy of the state alone (SLSQP)."""
    shape = tree.teacher.shape

    def evaluate(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[R] and d - C of each sequence, (1 + L,), and their Jacobian."""

        def both(logits: Tensor) -> Tensor:
            seq = sequences(tree, logits.view(shape))
            return torch.cat([(seq.prob * tree.reward).sum(1), budget - seq.cost.sum(-1)[0]])

        logits = torch.from_numpy(flat)
        return both(logits).numpy(), torch.autograd.functional.jacobian(both, logits, vectorize=True).numpy()

    best = 0.0
    for _ in range(starts):
        start = (tree.teacher.numpy() + 0.3 * rng.standard_normal(shape)).ravel()
        found = minimize(
            lambda x: (-evaluate(x)[0][0], -evaluate(x)[1][0]),
            start,
            jac=True,
            method="SLSQP",
            constraints={"type": "ineq", "fun": lambda x: evaluate(x)[0][1:], "jac": lambda x: evaluate(x)[1][1:]},
            options={"maxiter": 300, "ftol": 1e-10},
        )
        values = evaluate(found.x)[0]
        if values[1:].min() >= -1e-6:
            best = max(best, float(values[0]))
    return best


def exact_penalty(parameters: dict) -> dict[str, pd.DataFrame]:
    """From what lambda on the hinge form's maximiser keeps the budget, and the price that predicts it.

    The maximiser earns W_lambda >= V; the least lambda with W_lambda <= V + tolerance is found by bisection. At the
    optimum one nat more at s would earn 1 / eta(s), its price; the greatest over the states whose children are all ends
    is what theory says lambda has to exceed. Section 3's form and the overshoot form forfeit R beyond the budget; their
    maximisers keep it at every lambda > 0, so that there is nothing to measure (see `penalty_bound`).
    """
    settings = parameters["exact_penalty"]
    trees = make_trees(parameters, settings["trees"], stream=9)
    number = len(trees.reward)
    lambdas = np.geomspace(*settings["lambdas"])
    gains, thresholds = [], []
    for budget in parameters["budgets"]:
        grid = budget_grid(parameters, budget, settings["levels"])
        values = budgeted_values(trees, grid)
        attained = budgeted_policy(trees, grid, values, len(grid) - 1)
        best = values[:, 0, -1]
        last = (trees.paths.child < 0).all(1).numpy()

        def gain(price: np.ndarray, grid: np.ndarray = grid, best: np.ndarray = best) -> np.ndarray:
            return budgeted_values(trees, grid, price=torch.from_numpy(price))[:, 0, -1] - best

        for lam in lambdas:
            columns = {"budget": budget, "tree": range(number), "lambda": lam, "gain": gain(np.full(number, lam))}
            gains.append(pd.DataFrame(columns))
        low, high = np.full(number, np.log(lambdas[0])), np.full(number, np.log(lambdas[-1]))
        for _ in range(settings["bisections"]):
            middle = (low + high) / 2
            enough = gain(np.exp(middle)) <= settings["tolerance"]
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        prices = np.where(np.isfinite(attained.price), attained.price, 0.0)
        resolved = np.isfinite(attained.price[:, last]).all(1)  # no price lies below the grid's first step
        columns = {"budget": budget, "tree": range(number), "threshold": np.exp(high), "root_price": prices[:, 0]}
        columns |= {"greatest_price": prices[:, last].max(1), "resolved": resolved}
        thresholds.append(pd.DataFrame(columns))
    return {"exact_penalty_gain": pd.concat(gains), "exact_penalty": pd.concat(thresholds)}
