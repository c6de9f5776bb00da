"""The guarantees of section 4 of the method, (a) to (c), and the lambda from which the hinge form keeps the budget."""

import numpy as np
import pandas as pd
import torch
from scipy.integrate import cumulative_trapezoid
from scipy.optimize import minimize
from torch import Tensor

from replication.theory import FORMS, Found
from replication.theory import trees as exact
from replication.theory.optimum import soft_outcomes
from replication.theory.trees import Trees


def penalty_bound(parameters: dict) -> Found:
    """Section 4 (a), p <= (1 - J_c) / (1 + n), for three students.

    `any policy`: all policies on a grid that contains the teacher's probabilities. `one parameter`: the soft optima and
    the teacher, a student that cannot change one state alone. `per token`: `two_tokens`, on which the bound is tight.
    """
    settings = parameters["penalty_bound"]
    budget, points = settings["budget"], settings["points"]
    # 2 tokens, 2 steps, 3 states; the teacher's probabilities are moved to the nearest points of the grid
    trees = exact.make_trees(parameters, settings["trees"], stream=4, shape=(2, 2, False))
    grid = torch.arange(1, points + 1, dtype=torch.float64) / (points + 1)
    nearest = grid[(trees.teacher.exp()[..., :1] - grid).abs().argmin(-1)]  # (N, S)
    trees = trees._replace(teacher=torch.stack([nearest, 1 - nearest], -1).log())
    every = torch.cartesian_prod(grid, grid, grid)  # (P, S)
    policies = torch.stack([every, 1 - every], -1).log().expand(settings["trees"], -1, -1, -1)
    tilts = exact.make_trees(parameters), np.geomspace(*parameters["soft_lambdas"])
    students = {"any policy": exact.outcomes(trees, policies, budget), "one parameter": soft_outcomes(*tilts, budget)}
    students["per token"] = two_tokens(settings["per_token"], settings["fine"])
    for case, found in students.items():
        within, violation = found["within"], found["violation"]  # (N, policies)
        feasible = np.where(violation <= 1e-12, within, -np.inf).max(1)
        for n in settings["penalties"]:
            value = within - n * violation  # J~; of equally good policies the one that violates least
            best = np.where(value >= value.max(1, keepdims=True) - 1e-12, violation, np.inf).min(1)
            columns = {"case": case, "tree": range(len(best)), "n": n, "p": best, "bound": (1 - feasible) / (1 + n)}
            yield "penalty_bound", pd.DataFrame(columns)


def two_tokens(per_token: float, points: int) -> dict[str, np.ndarray]:
    """Outcomes of `points` policies, (1, points) each, on the tree on which bound (a) is tight.

    EOS first earns 0, anything else 1 at the second and last token; the teacher is uniform. The student tilts away from
    EOS and pays for it at the root, before it is known whether one token or two have been granted.
    """
    paths = exact.enumerate_paths(2, 2)  # token 1 is EOS
    length = paths.mask.sum(1).double()
    teacher = torch.full((1, len(paths.child), 2), 0.5, dtype=torch.float64).log()
    eos = torch.linspace(0, 0.5, points + 1, dtype=torch.float64)[1:]
    policies = teacher[:, None].repeat(1, points, 1, 1)
    policies[0, :, 0] = torch.stack([1 - eos, eos], -1).log()
    return exact.outcomes(Trees(paths, teacher, (length == 2).double()[None]), policies, (per_token * length)[None])


def augmentation(parameters: dict) -> Found:
    """Section 4 (b): policies that see z, by dynamic programming; policies that do not, by nonlinear programming."""
    settings = parameters["augmentation"]
    trees = exact.make_trees(parameters, settings["trees"], stream=5, shape=tuple(settings["shape"]))
    grid = exact.budget_grid(parameters, settings["budget"])
    lower, upper = (exact.budgeted_values(trees, grid, bound)[:, 0, -1] for bound in ("lower", "upper"))
    rng = np.random.default_rng([parameters["seed"], 5])
    for row in range(settings["trees"]):
        tree = Trees(trees.paths, trees.teacher[[row]], trees.reward[[row]])
        columns = {"tree": row, "sees_z": lower[row], "sees_z_upper": upper[row]}
        columns["does_not"] = without_budget(tree, grid[-1], settings["starts"], rng)
        yield "augmentation", pd.DataFrame([columns])


def without_budget(tree: Trees, budget: float, starts: int, rng: np.random.Generator) -> float:
    """max E[R] such that C <= d on every sequence, over the logits of a policy of the state alone (SLSQP)."""
    shape = tree.teacher.shape

    def both(logits: Tensor | np.ndarray) -> Tensor:
        """E[R] and d - C of each sequence, (1 + L,)."""
        seq = exact.sequences(tree, torch.as_tensor(logits).view(shape))
        return torch.cat([(seq.prob * tree.reward).sum(1), budget - seq.cost.sum(-1)[0]])

    def slopes(x: np.ndarray) -> Tensor:
        return torch.autograd.functional.jacobian(both, torch.from_numpy(x), vectorize=True)

    best, options = 0.0, {"maxiter": 300, "ftol": 1e-10}
    goal = {"fun": lambda x: -both(x)[0], "jac": lambda x: -slopes(x)[0]}
    kept = {"type": "ineq", "fun": lambda x: both(x)[1:], "jac": lambda x: slopes(x)[1:]}
    for _ in range(starts):
        start = (tree.teacher.numpy() + 0.3 * rng.standard_normal(shape)).ravel()
        found = minimize(x0=start, method="SLSQP", constraints=kept, options=options, **goal)
        reward, *slack = both(found.x).tolist()
        best = max(best, reward) if min(slack) >= -1e-6 else best
    return best


def gradient(parameters: dict) -> Found:
    """Section 4 (c): the formula against central differences in random directions, at random policies."""
    settings = parameters["gradient"]
    budget, step = settings["budget"], settings["step"]
    trees, source = exact.make_trees(parameters, settings["trees"], stream=6), exact.generator(parameters, 7)
    noise, direction = torch.randn(2, *trees.teacher.shape, generator=source, dtype=torch.float64)
    policies = [trees.teacher + noise + shift * direction for shift in (step, -step, 0.0)]
    before, after = (exact.over_budget(trees, end, budget).flatten(1) for end in policies[:2])
    for form in FORMS:
        strengths = {"form": form, "lam": settings["lambda"], "penalty": settings["penalty"]}
        found = [exact.modified_objective(trees, policy, budget, **strengths) for policy in policies]
        (ahead, _), (behind, _), (_, slope) = found
        formula, difference = (slope * direction).sum((1, 2)), (ahead - behind) / (2 * step)
        columns = {"form": form, "tree": range(len(slope)), "formula": formula, "difference": difference}
        columns |= {"error": formula - difference, "crossing": (before != after).any(1)}
        yield "gradient", pd.DataFrame(columns)


def jump(parameters: dict) -> Found:
    """J~ along a line from the teacher to a soft optimum, the integral of formula (c) along it, and J~'s jumps."""
    settings, rows = parameters["jump"], []
    tree, lam = exact.make_trees(parameters, 1, stream=8), settings["lambda"]
    target = exact.soft_optimum(tree, settings["soft_lambda"])[1]

    def along(position: np.ndarray) -> tuple[Trees, Tensor, float]:
        logits = torch.lerp(tree.teacher, target, torch.from_numpy(position)[:, None, None])
        return tree.repeat(len(position)), logits, settings["budget"]

    line = {"position": (position := np.linspace(0, 1, settings["points"]))}
    for form in FORMS:
        value, slope = exact.modified_objective(*along(position), form, lam=lam)
        slope = (slope * (target - tree.teacher)).sum((1, 2)).numpy()
        line[form] = value.numpy()
        line[f"{form}_integrated"] = line[form][0] + cumulative_trapezoid(slope, position, initial=0)
    yield "jump_line", pd.DataFrame(line)

    # each crossing, by bisection on which steps are over budget, and the jump across it
    over = exact.over_budget(*along(position)).flatten(1)
    for index in (over[1:] != over[:-1]).any(1).nonzero()[:, 0].tolist():
        left, right = position[index], position[index + 1]
        while right - left > 1e-12:
            middle = (left + right) / 2
            before, there = exact.over_budget(*along(np.array([left, middle])))
            left, right = (middle, right) if torch.equal(before, there) else (left, middle)
        ends = along(np.array([left, right]))
        seq, (before, after) = exact.sequences(*ends[:2]), exact.over_budget(*ends)
        # a crossing forfeits R (not in the hinge form); section 3's form also charges lam times that step's cost
        crossed = after & ~before
        lost = {"overshoot": tree.reward[0] * crossed[:, -1], "hinge": torch.zeros(1)}
        lost["exhausted"] = lost["overshoot"] + lam * (crossed * seq.cost[1]).sum(-1)
        for form in FORMS:
            below, above = exact.modified_objective(*ends, form, lam=lam)[0].tolist()
            expected = -float((seq.prob[1] * lost[form]).sum())
            rows.append((form, left, above - below, expected, above - below - expected))
    yield "jump_crossings", pd.DataFrame(rows, columns=["form", "position", "jump", "expected", "error"])


def exact_penalty(parameters: dict) -> Found:
    """The lambda from which the hinge form's maximiser keeps the budget, and the price that predicts it.

    The maximiser earns W_lambda >= V; bisection finds the least lambda with W_lambda <= V + tolerance. At the optimum
    one more nat at s would earn 1 / eta(s), its price; lambda has to exceed the greatest price over the states whose
    children are all ends. The other forms' maximisers keep the budget at every lambda > 0 (see `penalty_bound`).
    """
    settings = parameters["exact_penalty"]
    trees, lambdas = exact.make_trees(parameters, settings["trees"], stream=9), np.geomspace(*settings["lambdas"])
    last = (trees.paths.child < 0).all(1).numpy()
    for budget in parameters["budgets"]:
        row = {"budget": budget, "tree": range(settings["trees"])}
        grid = exact.budget_grid(parameters, budget, settings["levels"])
        values = exact.budgeted_values(trees, grid)
        _, price = exact.budgeted_policy(trees, grid, values, len(grid) - 1)
        for lam in lambdas:
            gain = (exact.budgeted_values(trees, grid, price=lam) - values)[:, 0, -1]
            yield "exact_penalty_gain", pd.DataFrame(row | {"lambda": lam, "gain": gain})
        low, high = (np.full(settings["trees"], np.log(end)) for end in lambdas[[0, -1]])
        for _ in range(settings["bisections"]):
            middle = (low + high) / 2
            gain = (exact.budgeted_values(trees, grid, price=np.exp(middle)) - values)[:, 0, -1]
            enough = gain <= settings["tolerance"]
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        finite = np.where(np.isfinite(price), price, 0.0)
        columns = {"threshold": np.exp(high), "root_price": finite[:, 0], "greatest_price": finite[:, last].max(1)}
        columns |= {"resolved": np.isfinite(price[:, last]).all(1)}  # no price lies below the grid's first step
        yield "exact_penalty", pd.DataFrame(row | columns)
