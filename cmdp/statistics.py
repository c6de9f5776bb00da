"""Means with 95 % bootstrap intervals over seeds and prompts (crossed), from the tables of `evaluation`."""

import functools

import numpy as np
import pandas as pd

RESAMPLES = 2000
MEASURES = {"accuracy": "correct", "csr": "satisfied", "accuracy_within": "correct_within", "validity": "valid"}
MEASURES |= {"greedy_accuracy": "correct", "cost": "cost", "kl_per_token": "kl", "entropy": "entropy"}
MEASURES |= {"tokens": "tokens", "truncated": "truncated"}
MANY_RESAMPLES = 20_000  # for a level near 1, whose tails are thin


def with_budget(completions: pd.DataFrame, budget: float, budget_form: str = "total") -> pd.DataFrame:
    """Add what depends on the budget: `satisfied` (C <= d), `kl` (nats per token) and `correct_within` (right and
    satisfied: the task reward under the constraint)."""
    limit = budget if budget_form == "total" else budget * completions["tokens"]
    satisfied = (completions["cost"] <= limit).astype(int)
    return completions.assign(
        satisfied=satisfied,
        correct_within=satisfied * completions["correct"],
        kl=completions["cost"] / completions["tokens"].clip(lower=1),
    )


def cells(completions: pd.DataFrame, column: str) -> np.ndarray:
    """Mean of `column` for each seed and prompt: (seeds, prompts)."""
    return completions.pivot_table(index="seed", columns="prompt", values=column, aggfunc="mean").to_numpy()


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of `values` (seeds, prompts) with seeds and prompts drawn anew, with replacement: (resamples,).

    Arrays of one shape share resamples under one seed (paired bootstrap).
    """
    by_seed, by_prompt = _draws(*values.shape, seed, resamples)
    return np.einsum("rs,sp,rp->r", by_seed, values, by_prompt, optimize=True)


@functools.lru_cache(maxsize=8)
def _draws(seeds: int, prompts: int, seed: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights of seeds (resamples, seeds) and prompts (resamples, prompts) in each draw."""
    rng = np.random.default_rng(seed)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    return by_seed, rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts


def bounds(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the interval at `level` of a statistic whose bootstrap gave `draws`."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(
    values: np.ndarray, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(mean, low, high): the mean of `values` (seeds, prompts) and its bootstrap interval at `level`."""
    return float(values.mean()), *bounds(bootstrap(values, seed, resamples), level)


def summarise(completions: pd.DataFrame, budget: float, budget_form: str = "total", measures=MEASURES) -> pd.DataFrame:
    """One row per run and measure: `run`, `measure`, `mean`, `low`, `high`, `seeds`. Without greedy rows there is
    no greedy accuracy, and without valid steps no validity.

    Args:
        completions: the tables of all runs, with columns `run` and `seed`.
        measures: the column of `with_budget` that each measure is the mean of.
    """
    completions = with_budget(completions, budget, budget_form)
    rows = []
    for run, group in completions.groupby("run", sort=False):
        for measure, column in measures.items():
            table = group[group["decoding"] == ("greedy" if measure == "greedy_accuracy" else "sampled")]
            if not table[column].isna().all():  # no such completions, or not defined for the task
                rows.append((run, measure, *interval(cells(table, column)), group["seed"].nunique()))
    return pd.DataFrame(rows, columns=["run", "measure", "mean", "low", "high", "seeds"])
