"""What a budget can buy: an exact bound on accuracy, from the teacher's pass rates alone (method, section 11).

A student that is right with probability a on a prompt, where the teacher is with q, spends at least kl(a || q) nats on
it. So `spend(d, q)`, the larger root of kl(a || q) = d, bounds every method, and its mean over prompts is the price
list from which to choose a budget. The nats beyond kl(a || q) that a student spends are wasted: they buy no accuracy.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from cmdp.statistics import bootstrap, bounds

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0)  # nats per completion
BOUGHT = 0.8  # the suggested budget buys this share of what the largest does


def bernoulli_kl(a, q) -> np.ndarray:
    """kl(a || q) = a log(a/q) + (1 - a) log((1 - a)/(1 - q)) in nats, with 0 log 0 = 0, elementwise."""
    a, q = np.broadcast_arrays(np.asarray(a, float), np.asarray(q, float))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x == 0, 0.0, x * np.log(x / y)) for x, y in ((a, q), (1 - a, 1 - q))]
    return sum(parts)


def spend(budget, q) -> np.ndarray:
    """a(d; q), the highest accuracy that `budget` nats can buy where the teacher's is `q`, elementwise: the larger root
    of kl(a || q) = d, or 1 where -log q <= d. Where q is 0 nothing can be bought."""
    budget, q = np.broadcast_arrays(np.asarray(budget, float), np.asarray(q, float))
    low, high = q.copy(), np.ones_like(q)
    for _ in range(60):
        middle = (low + high) / 2
        within = bernoulli_kl(middle, q) <= budget
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    return np.where(q == 0, 0.0, np.where(bernoulli_kl(1.0, q) <= budget, 1.0, low))


def price_list(right: np.ndarray, samples: int, budgets=BUDGETS, seed: int = 0) -> pd.DataFrame:
    """The ceiling of each budget, from `right` (prompts,), how many of `samples` completions per prompt are right.

    a(d; q) is concave in q, so a mean over sampled pass rates is too low: column `plug_in`. `ceiling` is its jackknife,
    which removes the bias of order 1/samples; with many pass rates of 0 or 1 it may still be low. `low` and `high` are
    its 95 % bootstrap interval over prompts. The first row, budget 0, is the teacher.

    Raises:
        ValueError: fewer than two samples.
    """
    if samples < 2:
        raise ValueError("The price list needs two samples per prompt or more: its bias is estimated from them.")
    right, rows = np.asarray(right, float), []
    for budget in (0.0, *budgets):
        bought = spend(budget, right / samples)
        without = [spend(budget, (right - one).clip(0, samples - 1) / (samples - 1)) for one in (1, 0)]
        left = (right * without[0] + (samples - right) * without[1]) / samples
        corrected = samples * bought - (samples - 1) * left
        interval = bounds(bootstrap(corrected[None], seed))
        rows.append((budget, bought.mean(), *(min(float(x), 1.0) for x in (corrected.mean(), *interval))))
    return pd.DataFrame(rows, columns=["budget", "plug_in", "ceiling", "low", "high"])


def suggest(prices: pd.DataFrame) -> float:
    """The smallest budget of a price list that buys `BOUGHT` of the accuracy which its largest budget buys."""
    gained = prices["ceiling"] - prices["ceiling"].iloc[0]
    return float(prices["budget"][gained >= BOUGHT * gained.iloc[-1]].iloc[0])


def account(accuracy: np.ndarray, pass_rate: np.ndarray, cost: np.ndarray) -> dict[str, float]:
    """Where a student's nats went: `cost`, the mean; `useful`, the mean over prompts of kl(a || q) where a > q, 0 where
    no accuracy was bought; `wasted`, the rest.

    `accuracy` a, `pass_rate` q of the teacher, and mean `cost` by prompt, (prompts,). Sampled rates make `useful` too
    high, so `useful_at_least` has kl of the means, which convexity puts below it whatever the number of samples.
    """
    useful = float(bernoulli_kl(np.maximum(accuracy, pass_rate), pass_rate).mean())
    mean, rate, spent = (float(np.mean(x)) for x in (accuracy, pass_rate, cost))
    at_least = float(bernoulli_kl(max(mean, rate), rate))
    return {"cost": spent, "useful": useful, "wasted": spent - useful, "useful_at_least": at_least}


def measured(experiment, pair: tuple, problems: list[dict], seed: int = 0) -> tuple[pd.DataFrame, dict[str, float]]:
    """(price list, account of the student) from completions of both models of `pair` (student, teacher, tokenizer) on
    `problems` of the `train.Experiment`. The price list has `per_token` too: the budget in nats per token, at the
    teacher's mean length. Raises `ValueError` for a reward that is not 0 or 1."""
    from cmdp.train import measure

    student, teacher, tokenizer = pair
    rates = {}
    for role, model in (("teacher", teacher), ("student", student)):
        completions, _ = measure(experiment, (model, teacher, tokenizer), seed, problems, greedy=False)
        if not completions["correct"].isin([0, 1]).all():
            raise ValueError("The ceiling is one of accuracy: give a reward that is 0 or 1.")
        rates[role] = completions.groupby("prompt")[["correct", "cost", "tokens"]].mean()
    samples, q = experiment.evaluate.samples, rates["teacher"]["correct"]
    prices = price_list((q * samples).round().to_numpy(), samples, seed=seed)
    prices.insert(1, "per_token", prices["budget"] / rates["teacher"]["tokens"].mean())
    smoothed = [(role["correct"] * samples + 0.5) / (samples + 1) for role in rates.values()]  # so that kl is finite
    accuracy = {"accuracy": float(rates["student"]["correct"].mean()), "teacher": float(q.mean())}
    return prices, accuracy | account(smoothed[1], smoothed[0], rates["student"]["cost"])


def draw(prices: pd.DataFrame, found: dict[str, float], path: Path) -> None:
    """Draw a price list and the student's point. Needs matplotlib."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.fill_between(prices["budget"], 100 * prices["low"], 100 * prices["high"], alpha=0.2, linewidth=0)
    axes.plot(prices["budget"], 100 * prices["ceiling"], label="ceiling of every method")
    axes.plot(found["cost"], 100 * found["accuracy"], "ko", label="student")
    axes.set(xlabel="nats per completion", ylabel="accuracy, sampled (%)", ylim=(0, 101))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=160)
    plt.close(figure)
