"""What a budget can buy in the default experiment, exactly (method, section 11): its contest test and its ceiling.

A problem has one right completion, and a slip is never made good. So a student is a chain: it takes step i right with
probability a_i where the teacher does with p_i, is right with prod a_i, and spends kl(a_i || p_i) nats at each step up
to its first slip. Arrays are (N, K), a row per prompt; steps that a prompt has not are 1. No torch: p is read from
results files.
"""

from collections import namedtuple
from collections.abc import Collection

import numpy as np
import pandas as pd

from cmdp.ceiling import BUDGETS, account, bernoulli_kl, spend
from cmdp.statistics import bootstrap, bounds, cells, interval, with_budget

TEACHER = "teacher"  # the run that measures it
TESTED = (0.2, 0.3, 0.5, 0.8, 1.2)  # budgets of the contest test, in nats
LAMBDAS = np.geomspace(0.03, 5, 160)
CSR = 0.95  # that the contest test asks of the soft Lagrangian

Outcome = namedtuple("Outcome", "accuracy csr cost")  # means over prompts


def outcome(a: np.ndarray, p: np.ndarray, budget: float) -> Outcome:
    """Accuracy, CSR at `budget`, and mean cost in nats of the policies a."""
    nats = bernoulli_kl(a, p)
    spent, right = nats.cumsum(axis=1), a.prod(axis=1)
    reached = np.concatenate([np.ones((len(a), 1)), a[:, :-1].cumprod(axis=1)], axis=1)
    over = (reached * (1 - a) * (spent > budget + 1e-9)).sum(axis=1) + right * (spent[:, -1] > budget + 1e-9)
    return Outcome(right.mean(), 1 - over.mean(), (reached * nats).sum(axis=1).mean())


def soft_optimum(p: np.ndarray, lam: float) -> np.ndarray:
    """The soft Lagrangian's: a_i = p_i exp(V_{i+1} / lambda) / Z_i with V_i = lambda log Z_i and V_{K+1} = 1."""
    a, value = np.empty_like(p), np.ones(len(p))
    for step in reversed(range(p.shape[1])):
        a[:, step] = 1 / (1 + (1 - p[:, step]) / p[:, step] * np.exp(-value / lam))
        value = value + lam * np.log(p[:, step] / a[:, step])
    return a


@np.errstate(divide="ignore", invalid="ignore")
def budgeted_optimum(p: np.ndarray, budget: float) -> np.ndarray:
    """max prod a_i subject to sum_i kl(a_i || p_i) <= d: 1 / a_i = mu (logit a_i - logit p_i), mu by bisection."""
    logit = np.log(p) - np.log1p(-p)

    def policy(mu: np.ndarray) -> np.ndarray:
        low, high = p, np.ones_like(p)
        for _ in range(50):
            a = (low + high) / 2
            more = 1 / a > mu[:, None] * (np.log(a) - np.log1p(-a) - logit)
            low, high = np.where(more, a, low), np.where(more, high, a)
        return np.where(p == 1, 1.0, low)

    low, high = np.full(len(p), -14.0), np.full(len(p), 14.0)
    for _ in range(50):
        middle = (low + high) / 2
        within = bernoulli_kl(policy(np.exp(middle)), p).sum(axis=1) <= budget
        low, high = np.where(within, low, middle), np.where(within, middle, high)
    free = -np.log(p).sum(axis=1) <= budget
    return np.where(free[:, None], 1.0, policy(np.exp(high)))


def contest(p: np.ndarray, budgets: tuple[float, ...]) -> pd.DataFrame:
    """The contest test: at each budget the teacher's accuracy, the budgeted optimum's, that of the best soft Lagrangian
    which meets `CSR`, its lambda, the gap between them, and the ceiling of every method."""
    rows, q = [], p.prod(axis=1)
    for budget in budgets:
        best = outcome(budgeted_optimum(p, budget), p, budget).accuracy
        found = [(outcome(soft_optimum(p, lam), p, budget), lam) for lam in LAMBDAS]
        soft, lam = max((one for one in found if one[0].csr >= CSR), key=lambda one: one[0].accuracy)
        rows.append((budget, q.mean(), best, soft.accuracy, lam, best - soft.accuracy, spend(budget, q).mean()))
    return pd.DataFrame(rows, columns=["budget", "teacher", "budgeted", "soft", "soft_lambda", "gap", "ceiling"])


def by_design(slips: Collection[float], steps: list[int]) -> np.ndarray:
    """p of a teacher that has learnt its solutions perfectly: a row per name's slips and number of steps."""
    return np.array([np.where(np.arange(max(steps)) < count, 1 - slip, 1.0) for slip in slips for count in steps])


def measured(exact: pd.DataFrame) -> np.ndarray:
    """p of the trained teacher, from the gathered tables `exact.csv` of the runs. Raises `ValueError` if it was not
    measured."""
    own = exact[exact["run"] == TEACHER]
    if own.empty:
        raise ValueError(f"What a budget can buy is computed from the run {TEACHER!r}: keep it in experiments.yaml.")
    return own.filter(like="step_").fillna(1.0).to_numpy()


def contests(p: np.ndarray, slips: Collection[float], steps: list[int]) -> pd.DataFrame:
    """The contest test of the experiment as `measured` (p) and by design, and of two in which nobody can win: prompts
    that are all alike, and a careful teacher."""
    given = {"measured": p, "design": by_design(slips, steps), "one kind of prompt": by_design([0.25], [3])}
    given["careful"] = by_design([0.01] * len(slips), steps)
    tables = {name: contest(chances, TESTED) for name, chances in given.items()}
    return pd.concat(tables, names=["experiment"]).reset_index(level=0)


def prices(p: np.ndarray) -> pd.DataFrame:
    """What each budget buys: the ceiling with its 95 % interval over prompts, and both optima on chains. The pass rates
    are exact, so that the mean has no sampling bias (`cmdp.ceiling.price_list`)."""
    table = contest(p, BUDGETS)
    ends = [bounds(bootstrap(spend(budget, p.prod(axis=1))[None])) for budget in table["budget"]]
    table["low"], table["high"] = zip(*ends, strict=True)
    return table[["budget", "ceiling", "low", "high", "budgeted", "soft", "soft_lambda"]]


def accounts(completions: pd.DataFrame, budgets: dict[str, float]) -> pd.DataFrame:
    """A row per run of `budgets`: its accuracy as a share of the ceiling at its own mean cost, and how many of its nats
    are useful and wasted.

    The accuracy is exact, column `right` of the sampled `completions`, those of the teacher among them; costs and CSR
    are sampled. Nats are useful by seed and prompt: a mean over seeds first would be a better student than any.
    """
    by_run, rows = dict(list(completions.groupby("run", sort=False))), []
    q = cells(by_run[TEACHER], "right").mean(axis=0)
    for run in [run for run in by_run if run in budgets]:
        table = with_budget(by_run[run], budgets[run])
        a, row = cells(table, "right"), {"run": run, "budget": budgets[run]}
        row["accuracy"], row["low"], row["high"] = interval(a)
        found = account(a, np.broadcast_to(q, a.shape), cells(table, "cost"))
        row |= of_ceiling(row["accuracy"], q, found["cost"]) | {name: found[name] for name in ("useful", "wasted")}
        rows.append(row | {"csr": table["satisfied"].mean(), "seeds": len(a)})
    return pd.DataFrame(rows)


def of_ceiling(accuracy: float, q: np.ndarray, cost: float) -> dict[str, float]:
    """A mean `cost` in nats, the ceiling there, and the accuracy as a share of it."""
    most = at_mean_cost(q, cost)
    return {"cost": cost, "ceiling": most, "share": accuracy / most}


def at_mean_cost(q: np.ndarray, cost: float) -> float:
    """The highest mean accuracy that a mean of `cost` nats over prompts can buy.

    It is max mean(a) subject to mean(kl(a || q)) <= cost. kl is convex in a, so at the optimum its derivative,
    logit a - logit q = eta, is one for all prompts: a nat buys as much on each.
    """
    low, high = 0.0, 50.0
    for _ in range(60):
        eta = (low + high) / 2
        a = q / (q + (1 - q) * np.exp(-eta))
        low, high = (eta, high) if bernoulli_kl(a, q).mean() <= cost else (low, eta)
    return float((q / (q + (1 - q) * np.exp(-low))).mean())
