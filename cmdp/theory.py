"""The theory study: what of section 4 holds, the exact optimum, and every learner against it (method, sections 2 to 7).

`run(parameters, folder)` writes small result files, each with the parameters that made it; `cmdp.theory_figures` draws
from them and `notebooks/01_theory.ipynb` tells the story. The same parameters give the same bytes; how long the dynamic
program takes, which no seed decides, is in a file of its own, `timing.csv`.
"""

import json
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import Tensor

from cmdp.tabular import (
    Trees,
    budgeted_policy,
    budgeted_values,
    enumerate_paths,
    modified_gradient,
    modified_objective,
    outcome,
    random_trees,
    repeat,
    sequences,
    soft_optimum,
    soft_values,
)
from cmdp.tabular_learners import STRENGTH, learn

FORMS = ("exhausted", "overshoot", "hinge")


def run(parameters: dict, folder: Path) -> None:
    """Every study in turn, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for study in (optimum, refinement, penalty_bound, augmentation, gradient, jump, exact_penalty, example, learners):
        for name, table in study(parameters).items():
            write(folder / f"{name}.csv", table, parameters)
    write(folder / "timing.csv", timing(parameters), parameters)
    summary = json.dumps({"parameters": parameters, "results": summarise(folder)}, indent=2)
    (folder / "summary.json").write_text(summary + "\n")


def write(path: Path, table: pd.DataFrame, parameters: dict) -> None:
    """A CSV whose first line is a comment: the parameters, as JSON."""
    with path.open("w") as file:
        file.write(f"# {json.dumps(parameters)}\n")
        table.to_csv(file, index=False, float_format="%.8g", lineterminator="\n")


def read(path: Path) -> pd.DataFrame:
    """What `write` wrote."""
    return pd.read_csv(path, skiprows=1)


# ------------------------------------------------------------------------------------------------- the pieces


def make_trees(parameters: dict, number: int, stream: int, shape: tuple[int, int, bool] | None = None) -> Trees:
    """`number` random trees; streams are independent of each other, and of how many trees another one has."""
    tree = parameters["tree"]
    paths = enumerate_paths(*(shape or (tree["vocab"], tree["depth"], True)))
    return random_trees(number, paths, tree["sharpness"], tree["success"], generator(parameters, stream))


def generator(parameters: dict, stream: int) -> torch.Generator:
    seed = np.random.SeedSequence([parameters["seed"], stream]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


def budget_grid(parameters: dict, limit: float, levels: int | None = None) -> np.ndarray:
    """Budgets from 0 to `limit`, closer to each other near 0, where V(s, z) rises like a square root."""
    return limit * np.linspace(0, 1, levels or parameters["grid"]["levels"]) ** parameters["grid"]["power"]


def constant(value: float, number: int) -> Tensor:
    return torch.full((number,), value, dtype=torch.float64)


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


def test_trees(parameters: dict) -> Trees:
    """The trees on which the optimum is computed and the learners are judged."""
    return make_trees(parameters, parameters["learners"]["test_trees"], stream=1)


# ---------------------------------------------------------------------------------------- the optimum (section 5)


def optimum(parameters: dict) -> dict[str, pd.DataFrame]:
    """The bracket of V(s_0, d), the policy that attains its lower end, and the best soft Lagrangian, tree by tree."""
    trees = test_trees(parameters)
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
            "policy_reward": found["reward"].numpy(),
            "policy_violation": found["violation"].numpy(),
            "policy_worst": found["worst"].numpy(),
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


def timing(parameters: dict) -> pd.DataFrame:
    """Seconds and peak memory of one dynamic program as V, H and the grid of budgets grow."""
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
    return pd.DataFrame(rows, columns=columns)


# -------------------------------------------------------------------------------------- the guarantees (section 4)


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

    trees = test_trees(parameters)
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
        without_budget(Trees(trees.paths, trees.teacher[[i]], trees.reward[[i]]), grid[-1], settings["starts"], rng)
        for i in range(settings["trees"])
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


def gradient(parameters: dict) -> dict[str, pd.DataFrame]:
    """Section 4 (c): the formula against central differences in random directions, at random policies."""
    settings = parameters["gradient"]
    trees = make_trees(parameters, settings["trees"], stream=6)
    source = generator(parameters, 7)
    logits = trees.teacher + torch.randn(trees.teacher.shape, generator=source, dtype=torch.float64)
    direction = torch.randn(trees.teacher.shape, generator=source, dtype=torch.float64)
    budget, step = constant(settings["budget"], len(logits)), settings["step"]
    tables = []
    for form in FORMS:
        strengths = {"lam": settings["lambda"], "penalty": settings["penalty"]}
        formula = (modified_gradient(trees, logits, budget, form, **strengths) * direction).sum((1, 2))
        ahead, behind = (
            modified_objective(trees, logits + sign * step * direction, budget, form, **strengths) for sign in (1, -1)
        )
        difference = (ahead - behind) / (2 * step)
        crossed = (
            over(trees, logits + step * direction, budget) != over(trees, logits - step * direction, budget)
        ).any(1)
        columns = {"form": form, "tree": range(len(logits)), "formula": formula, "difference": difference}
        tables.append(pd.DataFrame(columns | {"crossing": crossed}))
    return {"gradient": pd.concat(tables)}


def over(trees: Trees, logits: Tensor, budget: Tensor) -> Tensor:
    """Which steps are over the budget, (N, L H): a signature that changes exactly where a trajectory crosses it."""
    return (sequences(trees, logits).cost.cumsum(-1) > budget[:, None, None]).flatten(1)


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
    for form in FORMS:
        trees, logits, limits = along(position)
        value = modified_objective(trees, logits, limits, form, lam=settings["lambda"]).numpy()
        slope = modified_gradient(trees, logits, limits, form, lam=settings["lambda"])
        slope = (slope * (target - tree.teacher)).sum((1, 2)).numpy()
        line[form] = value
        line[f"{form}_integrated"] = value[0] + np.concatenate(
            [[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(position))]
        )

    # each crossing, by bisection on the signature, and the jump across it
    rows = []
    signature = over(*along(position))
    for left, right in zip(*(position[i] for i in crossings(signature)), strict=True):
        while right - left > 1e-12:
            both = over(*along(np.array([left, (left + right) / 2])))
            left, right = (
                ((left + right) / 2, right) if bool((both[0] == both[1]).all()) else (left, (left + right) / 2)
            )
        trees, logits, limits = along(np.array([left, right]))
        for form in FORMS:
            value = modified_objective(trees, logits, limits, form, lam=settings["lambda"])
            expected = expected_jump(trees, logits, limits, form, settings["lambda"])
            rows.append((form, left, float(value[1] - value[0]), expected))
    return {
        "jump_line": pd.DataFrame(line),
        "jump_crossings": pd.DataFrame(rows, columns=["form", "position", "jump", "expected"]),
    }


def crossings(signature: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the neighbours between which a signature changes."""
    left = (signature[1:] != signature[:-1]).any(1).nonzero()[:, 0].numpy()
    return left, left + 1


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
            gains.append(
                pd.DataFrame(
                    {"budget": budget, "tree": range(number), "lambda": lam, "gain": gain(np.full(number, lam))}
                )
            )
        low, high = np.full(number, np.log(lambdas[0])), np.full(number, np.log(lambdas[-1]))
        for _ in range(settings["bisections"]):
            middle = (low + high) / 2
            enough = gain(np.exp(middle)) <= settings["tolerance"]
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        prices = np.where(np.isfinite(attained.price), attained.price, 0.0)
        resolved = np.isfinite(attained.price[:, last]).all(1)  # no price lies below the grid's first step
        columns = {"budget": budget, "tree": range(number), "threshold": np.exp(high), "root_price": prices[:, 0]}
        columns["resolved"] = resolved
        thresholds.append(pd.DataFrame(columns | {"greatest_price": prices[:, last].max(1)}))
    return {"exact_penalty_gain": pd.concat(gains), "exact_penalty": pd.concat(thresholds)}


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
        cost = (policy * (policy / tree.teacher[0].exp()).log().nan_to_num(neginf=0.0)).sum(-1)
        spent = torch.zeros(len(policy), dtype=torch.float64)  # before the state's own cost
        for state, children in enumerate(tree.paths.child.tolist()):
            after = float(spent[state] + cost[state])
            for token, child in enumerate(children):
                if child >= 0:
                    spent[child] = after
                rows.append(
                    (name, state, int(tree.paths.depth[state]), token, child, float(policy[state, token]))
                    + (
                        float(tree.teacher[0, state, token].exp()),
                        after,
                        float(tree.reward[0, -1 - child]) if child < 0 else np.nan,
                    )
                )
    columns = ["policy", "state", "depth", "token", "child", "probability", "teacher", "spent", "reward"]
    return {"example": pd.DataFrame(rows, columns=columns).assign(budget=budget)}


# ------------------------------------------------------------------------------------------ learners against the oracle


def trials(parameters: dict, method: str) -> list[tuple[float, float]]:
    """(strength, learning rate) of each trial: as many for every method."""
    settings = parameters["learners"]
    strengths = settings["strengths"].get(method, settings["strengths"]["default"] if STRENGTH[method] else [0.0])
    rates = settings["learning_rates"][str(len(strengths))]
    return [(strength, rate) for strength in strengths for rate in rates]


def trained(
    parameters: dict,
    trees: Trees,
    choice: np.ndarray,
    budgets: Tensor,
    *,
    method: str,
    steps: int,
    samples: int,
    start_noise: float,
    streams: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Train a student for every tree and every row of choice (C, 2) and budgets (C,): outcomes, each (C, N).

    Args:
        start_noise: standard deviation of the students' logits around the teacher's before training.
        streams: of the students' start, the same for every method, and of the samples.
    """
    settings, number = parameters["learners"], len(trees.reward)
    noise = torch.randn(trees.teacher.shape, generator=generator(parameters, streams[0]), dtype=torch.float64)
    start = trees.teacher + start_noise * noise
    many, limits = repeat(trees, len(choice)), budgets.repeat(number)
    strength, rate = torch.from_numpy(choice).repeat(number, 1).unbind(1)
    logits = learn(
        many,
        start.repeat_interleave(len(choice), 0),
        limits,
        method,
        strength,
        rate,
        steps=steps,
        samples=samples,
        margin=settings["margin"],
        bins=settings["bins"],
        generator=generator(parameters, streams[1]),
    )
    return {name: value.view(number, -1).T.numpy() for name, value in outcome(many, logits, limits).items()}


def learners(parameters: dict) -> dict[str, pd.DataFrame]:
    """Tune every method on its own trees, choose for each budget, and judge the choice on the test trees.

    The choice: of the trials that violate in at most `allowed` of the trajectories, the one of most reward; if none
    does, the one that violates least.
    """
    settings = parameters["learners"]
    budgets = torch.tensor(parameters["budgets"], dtype=torch.float64)
    tuning, test = make_trees(parameters, settings["tuning_trees"], stream=10), test_trees(parameters)
    tuned, judged = [], []
    for number, (variant, setting) in enumerate(settings["variants"].items()):
        setting = dict(setting)
        for index, method in enumerate(setting.pop("methods", settings["methods"])):
            options = trials(parameters, method)

            # rows: budget by budget, trial by trial
            choice = np.array(options * len(budgets))
            sampler = 100 * number + index
            train = partial(trained, parameters, method=method, **setting)
            found = train(tuning, choice, budgets.repeat_interleave(len(options)), streams=(11, 11000 + sampler))
            sweep = pd.DataFrame(
                {"method": method, "variant": variant, "budget": budgets.repeat_interleave(len(options))}
            )
            sweep = sweep.assign(strength=choice[:, 0], learning_rate=choice[:, 1])
            sweep = sweep.assign(**{name: value.mean(1) for name, value in found.items()})
            allowed = sweep["violation"] <= settings["allowed"]
            # any trial within the allowance beats any that is not
            score = np.where(allowed, sweep["reward"], -1 - sweep["violation"]).reshape(len(budgets), -1)
            best = score.argmax(1) + np.arange(len(budgets)) * len(options)
            sweep["chosen"] = np.isin(np.arange(len(sweep)), best)
            tuned.append(sweep)

            found = train(test, choice[best], budgets, streams=(12, 12000 + sampler))
            for row, budget in enumerate(parameters["budgets"]):
                columns = {"method": method, "variant": variant, "budget": budget, "tree": range(len(test.reward))}
                columns |= {"strength": choice[best[row], 0], "learning_rate": choice[best[row], 1]}
                judged.append(pd.DataFrame(columns | {name: value[row] for name, value in found.items()}))
    return {"tuning": pd.concat(tuned), "learners": pd.concat(judged)}


# ---------------------------------------------------------------------------------------------------- the summary


def learners_table(folder: Path, resamples: int, seed: int) -> pd.DataFrame:
    """Methods against the exact optimum: means over trees and budgets with 95 % bootstrap intervals over trees.

    `of_optimum` is the sum of E[R] over the sum of V(s_0, d) (its attained, lower end); `of_upper` the same over the
    upper end. A learner can earn more than the optimum only by violating. The soft Lagrangian's exact optimum at each
    tree's own best lambda stands among the learners: what no learner of that kind can beat. `_gain` is the paired
    difference to gkd-grpo, the soft Lagrangian's learner.
    """
    optimum, judged = read(folder / "optimum.csv"), read(folder / "learners.csv")
    ideal = []
    for name in ("never", "rarely", "on_average"):
        table = optimum[["tree", "budget"]].assign(
            method=f"soft optimum, {name.replace('_', ' ')}", variant="closed form"
        )
        ideal.append(table.assign(reward=optimum[f"soft_{name}"], violation=optimum[f"soft_{name}_violation"]))
    both = pd.concat([judged, *ideal]).merge(optimum[["tree", "budget", "lower", "upper"]], on=["tree", "budget"])
    trees = optimum["tree"].nunique()
    # the same resamples for every method, so that differences are paired
    drawn = np.random.default_rng([seed, 13]).integers(trees, size=(resamples, trees))
    drawn = np.concatenate([np.arange(trees)[None], drawn])
    rows = []
    for budget, part in [("all", both), *both.groupby("budget")]:
        measured = {}
        for key, table in part.groupby(["variant", "method"], sort=False):
            sums = table.groupby("tree")[["reward", "violation", "lower", "upper"]].mean().sort_index().to_numpy()
            reward, violation, lower, upper = sums[drawn].mean(1).T  # the first is the estimate itself
            measured[key] = {"of_optimum": reward / lower, "of_upper": reward / upper, "csr": 1 - violation}
        for (variant, method), values in measured.items():
            row = {"budget": budget, "variant": variant, "method": method, "trees": trees}
            if baseline := measured.get((variant, "gkd-grpo")):
                values |= {f"{name}_gain": values[name] - baseline[name] for name in ("of_optimum", "csr")}
            for name, value in values.items():
                low, high = np.quantile(value[1:], [0.025, 0.975])
                row |= {name: value[0], f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def summarise(folder: Path) -> dict:
    """The numbers that the README and the notebook quote, from the result files alone."""
    optimum, bound, jumps = (read(folder / f"{name}.csv") for name in ("optimum", "penalty_bound", "jump_crossings"))
    gradients, augmented = read(folder / "gradient.csv"), read(folder / "augmentation.csv")
    thresholds = read(folder / "exact_penalty.csv")
    parameters = json.loads((folder / "optimum.csv").open().readline()[2:])
    resolved = thresholds[thresholds["resolved"]]
    smooth = gradients[~gradients["crossing"]]
    error = (smooth["formula"] - smooth["difference"]).abs() / smooth["difference"].abs().clip(lower=1e-3)
    positive = bound[bound["n"] > 0]
    table = learners_table(folder, parameters["learners"]["resamples"], parameters["seed"])
    return {
        "optimum": {
            "relative_gap_of_bracket": float(1 - optimum["lower"].sum() / optimum["upper"].sum()),
            "policy_minus_value": float((optimum["policy_reward"] - optimum["lower"]).abs().max()),
            "greatest_violation": float(optimum["policy_violation"].max()),
            "mean": float(optimum["lower"].mean()),
            "teacher": float(optimum["teacher"].mean()),
            "best_soft_never": float(optimum["soft_never"].mean()),
            "gain_over_best_soft_never": {
                str(budget): [float(x) for x in np.quantile(part["lower"] - part["soft_never"], [0.1, 0.5, 0.9])]
                for budget, part in optimum.groupby("budget")
            },
        },
        "penalty_bound": {
            case: {
                "greatest_p_over_bound": float((part["p"] / part["bound"].clip(lower=1e-12)).max()),
                "greatest_p_at_positive_n": float(positive[positive["case"] == case]["p"].max()),
            }
            for case, part in bound.groupby("case")
        },
        "augmentation": {"greatest_difference": float((augmented["does_not"] - augmented["sees_z"]).abs().max())},
        "gradient": {"greatest_relative_error": {f: float(error[smooth["form"] == f].max()) for f in FORMS}},
        "jump": {
            form: {
                "greatest": float(part["jump"].abs().max()),
                "greatest_error": float((part["jump"] - part["expected"]).abs().max()),
            }
            for form, part in jumps.groupby("form")
        },
        "mean_is_not_enough": {
            name: float(getattr(optimum["soft_on_average_violation"], name)())
            for name in ("min", "median", "mean", "max")
        },
        "exact_penalty": {
            name: [float(x) for x in np.quantile(thresholds[name], [0.1, 0.5, 0.9, 1.0])]
            for name in ("threshold", "greatest_price", "root_price")
        }
        | {
            "rank_correlation_where_resolved": float(
                resolved[["threshold", "greatest_price"]].corr(method="spearman").iloc[0, 1]
            ),
            "resolved": float(thresholds["resolved"].mean()),
        },
        "learners": [{k: v for k, v in row.items() if v == v} for row in table.to_dict(orient="records")],  # no NaN
    }
