"""Learners against the exact optimum: tuned alike on trees of their own, judged on held-out ones."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmdp.statistics import bootstrap
from replication.theory import STRENGTH
from replication.theory.learners import learn
from replication.theory.tabular import Trees, outcome, repeat
from replication.theory.trees import generator, held_out_trees, make_trees


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


def contest(parameters: dict) -> dict[str, pd.DataFrame]:
    """Tune every method on its own trees, choose for each budget, and judge the choice on the held-out trees.

    The choice: of the trials that violate in at most `allowed` of the trajectories, the one of most reward; if none
    does, the one that violates least.
    """
    settings = parameters["learners"]
    budgets = torch.tensor(parameters["budgets"], dtype=torch.float64)
    tuning, test = make_trees(parameters, settings["tuning_trees"], stream=10), held_out_trees(parameters)
    tuned, judged = [], []
    for number, (variant, setting) in enumerate(settings["variants"].items()):
        setting = dict(setting)
        for index, method in enumerate(setting.pop("methods", settings["methods"])):
            options = trials(parameters, method)
            sampler = 100 * number + index

            # rows: budget by budget, trial by trial
            choice, limits = np.array(options * len(budgets)), budgets.repeat_interleave(len(options))
            found = trained(parameters, tuning, choice, limits, method=method, streams=(11, 11000 + sampler), **setting)
            sweep = {"method": method, "variant": variant, "budget": limits}
            sweep |= {"strength": choice[:, 0], "learning_rate": choice[:, 1]}
            sweep = pd.DataFrame(sweep | {name: value.mean(1) for name, value in found.items()})
            # any trial within the allowance beats any that is not
            allowed = sweep["violation"] <= settings["allowed"]
            score = np.where(allowed, sweep["reward"], -1 - sweep["violation"]).reshape(len(budgets), -1)
            best = score.argmax(1) + np.arange(len(budgets)) * len(options)
            tuned.append(sweep.assign(chosen=np.isin(np.arange(len(sweep)), best)))

            found = trained(
                parameters, test, choice[best], budgets, method=method, streams=(12, 12000 + sampler), **setting
            )
            for row, budget in enumerate(parameters["budgets"]):
                columns = {"method": method, "variant": variant, "budget": budget, "tree": range(len(test.reward))}
                columns |= {"strength": choice[best[row], 0], "learning_rate": choice[best[row], 1]}
                judged.append(pd.DataFrame(columns | {name: value[row] for name, value in found.items()}))
    return {"tuning": pd.concat(tuned), "learners": pd.concat(judged)}


def against_optimum(optimum: pd.DataFrame, judged: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Methods against the exact optimum: means over trees and budgets with 95 % bootstrap intervals over trees.

    `of_optimum` is the sum of E[R] over the sum of V(s_0, d) (its attained, lower end). A learner can earn more than
    the optimum only by violating. The soft Lagrangian's exact optimum at each tree's own best lambda stands among the
    learners: what no learner of that kind can beat. `_gain` is the paired difference to gkd-grpo, the soft Lagrangian's
    learner.

    Args:
        optimum, judged: the tables `optimum` and `learners` of the study.
    """
    tables = [judged[["tree", "budget", "method", "variant", "reward", "violation"]]]
    for name in ("never", "rarely", "on_average"):
        ideal = optimum[["tree", "budget"]].assign(method=f"soft optimum, {name.replace('_', ' ')}")
        columns = {"reward": optimum[f"soft_{name}"], "violation": optimum[f"soft_{name}_violation"]}
        tables.append(ideal.assign(variant="closed form", **columns))
    both = pd.concat(tables).merge(optimum[["tree", "budget", "lower"]], on=["tree", "budget"])

    def means(trees: pd.Series) -> np.ndarray:
        """The mean over trees, (1 + resamples,): first the estimate, then the same resamples for every method."""
        return np.append(trees.mean(), bootstrap(trees.to_numpy()[None], seed))

    rows = []
    for budget, part in [("all", both), *both.groupby("budget")]:
        best = means(part.drop_duplicates(["tree", "budget"]).groupby("tree")["lower"].mean())
        measured = {}
        for key, table in part.groupby(["variant", "method"], sort=False):
            trees = table.groupby("tree")[["reward", "violation"]].mean()
            measured[key] = {"of_optimum": means(trees["reward"]) / best, "csr": 1 - means(trees["violation"])}
        for (variant, method), values in measured.items():
            row = {"budget": budget, "variant": variant, "method": method, "trees": optimum["tree"].nunique()}
            if baseline := measured.get((variant, "gkd-grpo")):
                values = values | {f"{name}_gain": values[name] - baseline[name] for name in values}
            for name, value in values.items():
                low, high = np.quantile(value[1:], [0.025, 0.975])
                row |= {name: value[0], f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)
