"""What a budget can buy in the default experiment, exactly (method, section 11): its contest test and its ceiling.

A problem has one right completion, and a slip is never made good. So a student is a chain: it takes step i right with
probability a_i where the teacher does with p_i, is right with prod a_i, and spends kl(a_i || p_i) nats at each step up to
its first slip. Arrays are (N, K), a row per prompt; steps that a prompt has not are 1. No torch: p is read from results.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from cmdp.ceiling import account, bernoulli_kl, spend

LAMBDAS = np.geomspace(0.03, 5, 160)


class Outcome(NamedTuple):
    """Means over prompts of a policy on chains."""

    accuracy: float
    csr: float
    cost: float


def outcome(a: np.ndarray, p: np.ndarray, budget: float) -> Outcome:
    """Accuracy, CSR at `budget`, and mean cost in nats of the policies a."""
    nats = bernoulli_kl(a, p)
    spent = nats.cumsum(axis=1)
    reached = np.concatenate([np.ones((len(a), 1)), a[:, :-1].cumprod(axis=1)], axis=1)
    right = a.prod(axis=1)
    over = (reached * (1 - a) * (spent > budget + 1e-9)).sum(axis=1) + right * (spent[:, -1] > budget + 1e-9)
    return Outcome(right.mean(), 1 - over.mean(), (reached * nats).sum(axis=1).mean())


def soft_optimum(p: np.ndarray, lam: float) -> np.ndarray:
    """The soft Lagrangian's: a_i = p_i exp(V_{i+1} / lambda) / Z_i with V_i = lambda log Z_i and V_{K+1} = 1."""
    a, value = np.empty_like(p), np.ones(len(p))
    for step in reversed(range(p.shape[1])):
        a[:, step] = 1 / (1 + (1 - p[:, step]) / p[:, step] * np.exp(-value / lam))
        value = value + lam * np.log(p[:, step] / a[:, step])
    return a


def budgeted_optimum(p: np.ndarray, budget: float) -> np.ndarray:
    """max prod a_i subject to sum_i kl(a_i || p_i) <= d: 1 / a_i = mu (logit a_i - logit p_i), mu by bisection."""
    with np.errstate(divide="ignore"):
        logit = np.log(p) - np.log1p(-p)

    def policy(mu: np.ndarray) -> np.ndarray:
        low, high = p.copy(), np.ones_like(p)
        for _ in range(50):
            a = (low + high) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
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


def contest(p: np.ndarray, budgets: list[float], csr: float = 0.95) -> pd.DataFrame:
    """The contest test: at each budget the teacher's accuracy, the budgeted optimum's, that of the best soft Lagrangian
    which meets `csr`, its lambda, the gap between them, and the ceiling of every method."""
    rows = []
    for budget in budgets:
        best = outcome(budgeted_optimum(p, budget), p, budget).accuracy
        found = [(outcome(soft_optimum(p, lam), p, budget), lam) for lam in LAMBDAS]
        soft, lam = max((one for one in found if one[0].csr >= csr), key=lambda one: one[0].accuracy)
        ceiling = spend(budget, p.prod(axis=1)).mean()
        rows.append((budget, p.prod(axis=1).mean(), best, soft.accuracy, lam, best - soft.accuracy, ceiling))
    return pd.DataFrame(rows, columns=["budget", "teacher", "budgeted", "soft", "soft_lambda", "gap", "ceiling"])


def by_design(slips: dict[str, float], steps: list[int]) -> np.ndarray:
    """p of a teacher that has learnt its solutions perfectly: a row per name and number of steps."""
    return chains([[1 - slip] * count for slip in slips.values() for count in steps])


def chains(rows: list[list[float]]) -> np.ndarray:
    """Rows of different lengths as (N, K), filled with 1."""
    return np.array([[*row, *[1.0] * (max(map(len, rows)) - len(row))] for row in rows])


def accounts(exact: pd.DataFrame, completions: pd.DataFrame, teacher: pd.DataFrame) -> pd.DataFrame:
    """Each run's accuracy as a share of the ceiling at its own mean cost, and its useful and wasted nats.

    `exact` has each run's probability of the right completion by seed and prompt, as `right`, `teacher` the teacher's;
    `completions` the sampled costs.
    """
    q, rows = teacher.groupby("prompt")["right"].mean(), []
    right = exact.groupby(["run", "prompt"], sort=False)["right"].mean()
    cost = completions.groupby(["run", "prompt"])["cost"].mean()
    for run in right.index.unique("run"):
        a, spent = right[run], cost[run]
        found = account(a.to_numpy(), q[a.index].to_numpy(), spent[a.index].to_numpy())
        ceiling = _at_mean_cost(q[a.index].to_numpy(), found["cost"])
        rows.append({"run": run, "accuracy": a.mean(), "ceiling": ceiling, "share": a.mean() / ceiling, **found})
    return pd.DataFrame(rows)


def _at_mean_cost(q: np.ndarray, cost: float) -> float:
    """The highest mean accuracy that a mean of `cost` nats can buy: nats are dealt to prompts so that a nat buys as much
    on each, by the tilt q exp(eta) / (q exp(eta) + 1 - q) with one eta for all."""
    low, high = 0.0, 50.0
    for _ in range(60):
        eta = (low + high) / 2
        a = q / (q + (1 - q) * np.exp(-eta))
        low, high = (eta, high) if bernoulli_kl(a, q).mean() <= cost else (low, eta)
    return float((q / (q + (1 - q) * np.exp(-low))).mean())
