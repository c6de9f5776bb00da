"""Learners against the exact optimum: tuned alike on trees of their own, judged on held-out trees."""

import itertools

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmdp.statistics import bootstrap, bounds
from replication.theory import LEARNERS, Found
from replication.theory.learners import learn
from replication.theory.trees import Trees, generator, make_trees, outcome


def trials(parameters: dict, method: str) -> np.ndarray:
    """(strength, learning rate) of each trial, (C, 2): as many for every method."""
    settings, given = parameters["learners"], parameters["learners"]["strengths"]
    strengths = given.get(method, given["default"]) if LEARNERS[method][1] else [0.0]
    return np.array([*itertools.product(strengths, settings["learning_rates"][str(len(strengths))])])


def trained(
    parameters: dict, trees: Trees, trials: np.ndarray, budgets: Tensor, method: str, variant: dict, streams: tuple
) -> pd.DataFrame:
    """Train a student for every trial (C, 2) with its budget (C,) on every tree: outcomes, one row per trial and tree.

    `variant` has `steps`, `samples` and `start_noise`, the deviation of the start's logits from the teacher's. Of the
    two `streams` of random numbers one is for the students' start, the same for every method, one for the samples.
    """
    number, count, sizes = len(trees.reward), len(trials), parameters["learners"] | variant
    noise, source = (generator(parameters, stream) for stream in streams)
    noise = torch.randn(trees.teacher.shape, generator=noise, dtype=torch.float64)
    start = (trees.teacher + variant["start_noise"] * noise).repeat_interleave(count, 0)
    many, limits = trees.repeat(count), budgets.repeat(number)
    strength, rate = torch.from_numpy(trials).repeat(number, 1).unbind(1)
    sizes = {name: sizes[name] for name in ("steps", "samples", "margin", "bins")}
    logits = learn(many, start, limits, method, strength, rate, generator=source, **sizes)
    found = {"budget": limits, "tree": torch.arange(number).repeat_interleave(count), "strength": strength}
    found |= {"learning_rate": rate} | outcome(many, logits, limits[:, None])
    return pd.DataFrame({name: value.view(number, count).T.flatten() for name, value in found.items()})


def contest(parameters: dict) -> Found:
    """Tune every method on the tuning trees, choose a trial for each budget, and judge it on the held-out trees.

    The choice: of the trials with at most `allowed` violations the one of most reward; without any, the one that
    violates least.
    """
    settings, keys, names = parameters["learners"], ["strength", "learning_rate"], ["method", "variant"]
    budgets = torch.tensor(parameters["budgets"], dtype=torch.float64)
    tuning, test = make_trees(parameters, settings["tuning_trees"], stream=10), make_trees(parameters)
    for number, (name, variant) in enumerate(settings["variants"].items()):
        for index, method in enumerate(variant.get("methods", settings["methods"])):
            options, stream = trials(parameters, method), 100 * number + index
            limits, options = budgets.repeat_interleave(len(options)), np.tile(options, (len(budgets), 1))
            sweep = trained(parameters, tuning, options, limits, method, variant, (11, 11000 + stream))
            sweep = sweep.drop(columns="tree").groupby(["budget", *keys], sort=False).mean().reset_index()
            # any allowed trial beats any other
            score = sweep["reward"].where(sweep["violation"] <= settings["allowed"], -1 - sweep["violation"])
            best = score.groupby(sweep["budget"], sort=False).idxmax()
            chosen = test, sweep.loc[best, keys].to_numpy(), budgets, method, variant, (12, 12000 + stream)
            tables = {"tuning": sweep.assign(chosen=sweep.index.isin(best)), "learners": trained(parameters, *chosen)}
            for kind, table in tables.items():
                yield kind, pd.concat({(method, name): table}, names=names).reset_index(names)


def against_optimum(optimum: pd.DataFrame, judged: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Methods against the exact optimum, from the tables `optimum` and `learners`: means over trees and budgets with
    95 % bootstrap intervals over trees.

    `of_optimum` is the sum of E[R] over the sum of V(s_0, d) (its attained, lower end): a learner earns more than the
    optimum only by violating. The soft Lagrangian's exact optimum at each tree's own best lambda stands beside the
    learners: no learner of that kind can beat it. `_gain` is the paired difference to gkd-grpo, its learner.
    """
    tables, keys = [judged], ["tree", "budget"]
    for name in ("never", "rarely", "on_average"):
        table = optimum.rename(columns={f"soft_{name}": "reward", f"soft_{name}_violation": "violation"})
        tables.append(table.assign(method=f"soft optimum, {name.replace('_', ' ')}", variant="closed form"))
    both = pd.concat(tables, join="inner").merge(optimum[[*keys, "lower"]], on=keys)

    def means(trees: pd.Series) -> np.ndarray:
        """The mean over trees and its resamples, the same for every method: (1 + resamples,)."""
        return np.append(trees.mean(), bootstrap(trees.to_numpy()[None], seed))

    rows = []
    for budget, part in [("all", both), *both.groupby("budget")]:
        measured = {}
        for key, table in part.groupby(["variant", "method"], sort=False):
            trees = table.groupby("tree")[["reward", "violation", "lower"]].mean()
            share = means(trees["reward"]) / means(trees["lower"])
            measured[key] = {"of_optimum": share, "csr": 1 - means(trees["violation"])}
        for (variant, method), values in measured.items():
            row = {"budget": budget, "variant": variant, "method": method, "trees": optimum["tree"].nunique()}
            if baseline := measured.get((variant, "gkd-grpo")):
                values = values | {f"{name}_gain": values[name] - baseline[name] for name in values}
            for name, value in values.items():
                row[name], row[f"{name}_low"], row[f"{name}_high"] = value[0], *bounds(value[1:])
            rows.append(row)
    return pd.DataFrame(rows)
