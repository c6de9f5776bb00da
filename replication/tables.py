"""Every table computed from completions, of the default experiment (`write_default`) and the study (`write_study`).

Means come with 95 % bootstrap intervals over seeds and prompts. Differences are paired over both, on the seeds that two
runs share; their 5 % is shared by all runs that one table compares with one baseline on one measure (Bonferroni).
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cmdp.statistics import MANY_RESAMPLES, RESAMPLES, bootstrap, bounds, cells, interval, summarise, with_budget
from cmdp.storage import provenance, read_runs, read_yaml, write_json, write_table
from replication import ceiling
from replication.experiments import EXPERIMENTS, PARAMS, RESULTS, Row, gather, rows
from replication.tune import MEASURED

# Methods whose training no trajectory budget enters: one run of theirs serves every budget of the frontier.
BUDGET_FREE = {"sft", "grpo", "gkd", "gkd-grpo", "minillm", "kdrl", "worst-case", "trl-grpo", "trl-gkd"}
ABLATED = {"saute-constant": "cmdp"}  # a method that is an ablation of another: cmdp without Phi
MEASURES = {"accuracy": "accurate", "csr": "satisfied", "accuracy_within": "correct_within", "validity": "right"}
MEASURES |= {"cost": "cost", "kl_per_token": "kl", "entropy": "entropy", "tokens": "tokens"}
COMPARED = {"accuracy": "accuracy", "csr": "CSR", "accuracy_within": "accuracy within budget", "validity": "validity"}
Pairs = Iterable[tuple[str, str]]  # a run and a baseline each
SHARES_OF_BUDGET = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, np.inf)


def write(part: str) -> None:
    """Compute the tables of `part`, default or study, into results/. Raises `ValueError` for another."""
    parts = {"default": write_default, "study": write_study}
    if part not in parts:
        raise ValueError(f"There are tables of {' and '.join(parts)}, not of {part!r}.")
    parts[part]()


def write_default(results: Path = RESULTS) -> None:
    """Gather the default runs, with means, metrics, times and provenance, and compute what a budget can buy."""
    runs, params = rows(part="default"), read_yaml(PARAMS)
    names = {"exact": "exact", "timing": "times", "curves": "training", "positions": "positions"}
    tables = {name: gather(kept, runs, results / "runs") for name, kept in names.items()}
    means = summary(read_completions(results, "default"), by_name(runs), params["budget"]["budget"])
    tables["summary"] = means[["run", "measure", "mean", "low", "high", "seeds"]]
    phases = tables["timing"].filter(like="time/").groupby(tables["timing"]["run"], sort=False).median()
    tables["timing"] = phases.dropna(how="all").reset_index()
    p, task = ceiling.measured(tables.pop("exact")), params["task"]
    tables |= {"contest": ceiling.contests(p, task["slips"].values(), task["steps"]), "prices": ceiling.prices(p)}
    for name, table in tables.items():
        write_table(table, results / f"{name}.csv")
    for run, measured in means.groupby("run"):  # a file each: `dvc metrics show` prints one line per run
        write_json(measured.set_index("measure")["mean"].round(4).to_dict(), results / "metrics" / f"{run}.json")
    write_json(provenance(), results / "provenance.json")


def write_study(results: Path = RESULTS) -> None:
    """Every table of the study but the verdicts (`claims.write`)."""
    settings, chosen = read_yaml(EXPERIMENTS), read_yaml(results / "chosen.yaml")
    given, budget, runs = settings["claims"], read_yaml(PARAMS)["budget"]["budget"], by_name(rows())
    completions = read_completions(results)
    sampled = completions[completions["decoding"] == "sampled"]
    names = [name for name, row in runs.items() if row.family == "method" and row.start == "student"]
    pairs = [*itertools.product(names, (chosen["best"]["soft"], "grpo", "gkd", "minillm"))]
    tables = {
        "summary": summary(completions, runs, budget),
        "frontier": frontier(sampled, runs, budget),
        "equal_csr": equal_csr(sampled, runs, soft_lambdas(runs, chosen["runs"]), budget, given["target"]),
        "paired": paired(sampled, pairs, budget, len(names)),
        "ablations": ablations(sampled, runs, budget),
        "wins": wins(sampled, pairs),
        "ranges": ranges(pd.read_csv(results / "tuning.csv"), given["near"]),
        "violation": violation(sampled, names, budget),
        "timing": timing(gather("times", rows(), results / "runs"), runs),
    }
    for name, table in tables.items():
        write_table(table, results / "study" / f"{name}.csv")
    budgets = {name: row.settings.get("budget", budget) for name, row in runs.items()}
    write_table(ceiling.accounts(sampled, budgets), results / "ceiling.csv")


def spelled(value: Sequence[float], unit: str = "", spec: str = "z.1f", scale: float = 100) -> str:
    """(mean, low, high) in per cent: `97.1 [96.5, 97.6]`."""
    mean, low, high = (format(scale * number, spec) for number in value)
    return f"{mean}{unit} [{low}, {high}]"


def percent(table: pd.DataFrame, mean: str, before: str = "", spec: str = "z.1f") -> pd.Series:
    """The column `mean` of each row `spelled`, with the interval in the columns `before`low and `before`high."""
    values = table[[mean, f"{before}low", f"{before}high"]].to_numpy()
    return pd.Series([spelled(value, spec=spec) for value in values], table.index)


def by_name(table: dict[str, Row]) -> dict[str, Row]:
    """The runs by name: the first of those pooled under one name."""
    named: dict[str, Row] = {}
    return {row.name: named.setdefault(row.name, row) for row in table.values()}


def read_completions(results: Path = RESULTS, part: str | None = None) -> pd.DataFrame:
    """Every completion of a part's runs or of all, with `run`, `right` (exact: the probability of the right completion)
    and `accurate`, whose mean over samples is the accuracy: `right`, a control variate, takes the place of `valid`."""
    completions, exact = (gather(name, rows(part=part), results / "runs") for name in ("completions", "exact"))
    completions = completions.merge(exact[["run", "seed", "prompt", "right"]], on=["run", "seed", "prompt"])
    return completions.assign(accurate=completions["right"] + completions["correct"] - completions["valid"])


def of_profile(folder: Path) -> tuple[pd.DataFrame, dict[str, Row], dict[str, float], float]:
    """What a profile left in `folder`, as the study's: its sampled completions, its runs by name, lambda of each of its
    soft Lagrangians in the order of lambda, and its budget in nats per trajectory. `right` and `accurate` are as in
    `read_completions`, but from the samples."""
    profile, completions = read_yaml(folder / "profile.yaml"), read_runs(folder / "completions")
    runs = {run: Row(run, row["method"], profile["seeds"], tuned=run, name=run) for run, row in profile["runs"].items()}
    lambdas = in_order({run: row["lam"] for run, row in profile["runs"].items() if row["method"] == "gkd-grpo"})
    sampled = completions[completions["decoding"] == "sampled"]
    sampled = sampled.assign(accurate=sampled["correct"], right=sampled["correct"] * sampled["valid"])
    return sampled, runs, lambdas, profile["budget"]["budget"]


def summary(completions: pd.DataFrame, runs: dict[str, Row], budget: float) -> pd.DataFrame:
    """One row per run and measure, the CSR at the run's own budget. Without greedy rows there is no greedy accuracy."""
    found = []
    for run, group in completions.groupby("run", sort=False):
        row, limit = runs[run], runs[run].settings.get("budget", budget)
        table = summarise(group, limit, measures=MEASURES | {"greedy_accuracy": "correct"})
        found.append(table.assign(family=row.family, tuned=row.tuned, start=row.start, budget=limit))
    columns = ["run", "family", "tuned", "start", "budget", "measure", "mean", "low", "high", "seeds"]
    return pd.concat(found, ignore_index=True)[columns]


def points(runs: dict[str, Row]) -> dict[str, str]:
    """The runs that the frontier shows: the student's, at its own and other budgets, and under which name: that of the
    run which differs in nothing but the budget."""

    def key(row: Row) -> tuple:
        return row.method, row.tuned, *sorted((name, value) for name, value in row.settings.items() if name != "budget")

    shown = {name: row for name, row in runs.items() if row.start == "student" and row.family in ("method", "budget")}
    named = {key(row): name for name, row in shown.items() if row.family == "method"}
    return {name: named.get(key(row), name) for name, row in shown.items()}


def frontier(completions: pd.DataFrame, runs: dict[str, Row], budget: float) -> pd.DataFrame:
    """Accuracy and CSR of each method at each budget some run was trained for. A method that knows no budget stands at
    all of them, another at those it was trained for (`trained_at`)."""
    limits, found = sorted({row.settings.get("budget", budget) for row in runs.values()}), []
    by_run, measures = dict(list(completions.groupby("run"))), ("accurate", "satisfied", "correct_within")
    for run, method in points(runs).items():
        free, own = runs[run].method in BUDGET_FREE, runs[run].settings.get("budget", budget)
        for limit in (limits if free else [own]) if run in by_run else ():
            table = with_budget(by_run[run], limit)
            values = [value for column in measures for value in interval(cells(table, column))]
            found.append((method, limit, None if free else limit, *values, table["seed"].nunique()))
    columns = [f"{name}{end}" for name in ("accuracy", "csr", "within") for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=["method", "budget", "trained_at", *columns, "seeds"])


def soft_lambdas(runs: dict[str, Row], chosen: dict[str, dict]) -> dict[str, float]:
    """Lambda of each run on the soft Lagrangian's curve, in the order of lambda."""
    return in_order({run: chosen[runs[run].tuned]["lam"] for run in points(runs) if runs[run].method == "gkd-grpo"})


def in_order(lambdas: dict[str, float]) -> dict[str, float]:
    """Runs by their lambda, the smallest first."""
    return dict(sorted(lambdas.items(), key=lambda item: item[1]))


def equal_csr(
    completions: pd.DataFrame,
    runs: dict[str, Row],
    lambdas: dict[str, float],
    budget: float,
    target: float,
    measure: str = "accuracy",
    level: float | None = None,
) -> pd.DataFrame:
    """Each constrained run against the soft Lagrangian at the run's own CSR, and against its best lambda at `target`.

    The soft Lagrangian is the curve through the points of its `lambdas` (`on_curve`): `soft` is its accuracy at the
    run's CSR. `difference` has no value where the run is looser than the curve (`place`). `low` and `high` resample
    seeds and prompts jointly for the run and the whole curve, and interpolate anew each time; draws looser than the
    curve are left out. `soft_at_target` is the accuracy of the best single lambda whose measured CSR is `target` or
    more, `target_difference` the run's to it. The runs of one budget share the 5 %, unless a `level` is given.
    """
    by_run, methods = dict(list(completions.groupby("run"))), points(runs)
    soft = {run: lam for run, lam in lambdas.items() if run in by_run}
    aware = [run for run in methods if run in by_run and soft and runs[run].method not in BUDGET_FREE]
    limits = {run: runs[run].settings.get("budget", budget) for run in aware}

    @functools.cache
    def drawn(run: str, limit: float, seeds: tuple[int, ...]) -> list[np.ndarray]:
        """CSR and accuracy: the mean and then its draws, (1 + resamples,) each, alike in all runs."""
        table = with_budget(by_run[run][by_run[run]["seed"].isin(seeds)], limit)
        both = [cells(table, column) for column in ("satisfied", MEASURES[measure])]
        return [np.append(values.mean(), bootstrap(values, resamples=MANY_RESAMPLES)) for values in both]

    found = []
    for run, limit in limits.items():
        own_level = level or 1 - 0.05 / list(limits.values()).count(limit)
        seeds = tuple(sorted(set.intersection(*(set(by_run[name]["seed"]) for name in (run, *soft)))))
        csr, accuracy = drawn(run, limit, seeds)
        curve = [np.array(part) for part in zip(*(drawn(name, limit, seeds) for name in soft), strict=True)]
        on = on_curve(*curve, csr)
        place = "looser" if np.isnan(on[0]) else "stricter" if csr[0] > curve[0][:, 0].max() else "within"
        more = accuracy - on
        ends = (np.nan, np.nan) if place == "looser" else bounds(more[1:][~np.isnan(more[1:])], own_level)
        row = (run, methods[run], limit, csr[0], *bounds(csr[1:], own_level), accuracy[0], on[0], place, more[0], *ends)
        meets = np.where(curve[0][:, 0] >= target, curve[1][:, 0], -np.inf)
        best, beyond = meets.argmax(), accuracy - curve[1][meets.argmax()]
        single = (list(soft.values())[best], meets[best], beyond[0], *bounds(beyond[1:], own_level))
        found.append((*row, *(single if meets[best] >= 0 else [np.nan] * 5), len(seeds)))
    columns = ["run", "method", "budget", "csr", "csr_low", "csr_high", measure, "soft", "place", "difference", "low"]
    columns += ["high", "soft_lambda", "soft_at_target", "target_difference", "target_low", "target_high", "seeds"]
    return pd.DataFrame(found, columns=columns)


def on_curve(csr: np.ndarray, accuracy: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The accuracy at CSR `at` (R,) of the curve through points `csr`, `accuracy` (L, R), in the order of lambda.

    Linear between neighbours; the best where noise lets the curve pass a CSR twice. A CSR above all points gets the
    strictest one's accuracy, one below them nan.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (at - csr[:-1]) / np.diff(csr, axis=0)
        between = np.where((share >= 0) & (share <= 1), accuracy[:-1] + share * np.diff(accuracy, axis=0), -np.inf)
    value = np.concatenate([between, np.where(csr == at, accuracy, -np.inf)]).max(axis=0)
    strictest = np.where(csr == csr.max(axis=0), accuracy, -np.inf).max(axis=0)
    value = np.where(at > csr.max(axis=0), strictest, value)
    return np.where(at < csr.min(axis=0), np.nan, value)


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, column: str, level: float = 0.95) -> tuple:
    """(mean, low, high, seeds) of ours minus theirs, paired over prompts and the seeds that both have."""
    seeds = sorted(set(ours["seed"]) & set(theirs["seed"]))
    ours, theirs = (cells(table[table["seed"].isin(seeds)], column) for table in (ours, theirs))
    drawn = bootstrap(ours, resamples=MANY_RESAMPLES) - bootstrap(theirs, resamples=MANY_RESAMPLES)
    return float((ours - theirs).mean()), *bounds(drawn, level), len(seeds)


def paired(completions: pd.DataFrame, pairs: Pairs, budget: float, comparisons: int) -> pd.DataFrame:
    """The first run of each of the `pairs` minus the second, measure by measure, where both were run, at a budget in
    nats per trajectory; as many `comparisons` share the 5 %."""
    found, level = [], 1 - 0.05 / comparisons
    for run, baseline, *both in _both_run(with_budget(completions, budget), pairs):
        found += [(run, baseline, name, *difference(*both, MEASURES[name], level)) for name in COMPARED]
    return pd.DataFrame(found, columns=["run", "baseline", "measure", "difference", "low", "high", "seeds"])


def ablations(completions: pd.DataFrame, runs: dict[str, Row], budget: float) -> pd.DataFrame:
    """Every run that changes settings of the one it is tuned as, minus that one, in the columns of `paired`."""
    changed = ABLATED | {name: row.tuned for name, row in runs.items() if {*row.settings} - {"budget"}}
    pairs = [(name, of) for name, of in changed.items() if name in runs and runs[name].family != "budget"]
    return paired(completions, pairs, budget, len(pairs))


def wins(completions: pd.DataFrame, pairs: Pairs, level: float = 0.95, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Reasoning win rate of the first run of each of the `pairs`, judged by program: of two derivations of one problem
    the valid one wins; where both or neither are, a tie counts half. The order of the two does not enter."""
    found = []
    tests = completions.assign(sample=completions.groupby(["run", "seed", "prompt"]).cumcount())
    for run, baseline, ours, theirs in _both_run(tests, pairs):
        merged = ours.merge(theirs, on=["seed", "prompt", "sample"], suffixes=("", "_baseline"))
        score = 0.5 + 0.5 * (merged["valid"] - merged["valid_baseline"])
        rate = interval(cells(merged.assign(score=score), "score"), level=level, resamples=resamples)
        found.append((run, baseline, *rate, float((score == 0.5).mean()), merged["seed"].nunique()))
    return pd.DataFrame(found, columns=["run", "baseline", "win_rate", "low", "high", "ties", "seeds"])


def _both_run(table: pd.DataFrame, pairs: Pairs) -> list[tuple]:
    """(run, baseline, completions of the run, of the baseline) of each of the `pairs` of which both were run."""
    by_run = dict(list(table.groupby("run")))
    return [(a, b, by_run[a], by_run[b]) for a, b in pairs if a != b and {a, b} <= set(by_run)]


def ranges(trials: pd.DataFrame, near: float) -> pd.DataFrame:
    """For each tuned run and parameter that its trials (results/tuning.csv) differ in: the `best` value, the least and
    greatest of trials whose score is within `near` of the best and of all, and how many are near it, of how many."""
    parameters, found = trials.columns.drop(["run", "trial", "seeds", "chosen", *MEASURED]), []
    for run, own in trials.groupby("run", sort=False):
        best = own.loc[own["score"].idxmax()]
        good = own[own["score"] >= best["score"] - near * abs(best["score"])]
        for name in [name for name in parameters if own[name].nunique() > 1]:
            ends = (good[name].min(), good[name].max(), own[name].min(), own[name].max())
            found.append((run, name, best[name], *ends, len(good), len(own)))
    columns = ["run", "parameter", "best", "low", "high", "tried_low", "tried_high", "near_best", "trials"]
    return pd.DataFrame(found, columns=columns)


def violation(completions: pd.DataFrame, names: list[str], budget: float) -> pd.DataFrame:
    """Accuracy, validity and entropy of completions by the share of the budget they spent, C / d."""
    tests, edges = completions[completions["run"].isin(names)], np.array(SHARES_OF_BUDGET)
    place = np.digitize(tests["cost"] / budget, edges[1:], right=True)
    measures = {"correct": "accuracy", "valid": "validity", "entropy": "entropy"}
    grouped = tests.assign(low=edges[place], high=edges[place + 1]).groupby(["run", "low", "high"])[[*measures]]
    table = grouped.mean().rename(columns=measures).assign(count=grouped.size()).reset_index()
    names = {low: f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)} | {
        edges[-2]: f"over {edges[-2]:g}"
    }
    return table.assign(bin=table["low"].map(names))[["run", "bin", "low", "high", "count", *measures.values()]]


def timing(times: pd.DataFrame, runs: dict[str, Row]) -> pd.DataFrame:
    """Seconds per training step: median, least and greatest over a run's seeds, and the ratio to the soft Lagrangian. A
    seed's time is the sum of its phases' medians, or of a trainer that logs no phases the mean over the run."""
    seconds = times.filter(like="time/").sum(axis=1, min_count=1).fillna(times["seconds"] / times["steps"])
    grouped = seconds.where(times["seconds"] > 0).groupby(times["run"], sort=False)
    table = grouped.agg(seconds="median", low="min", high="max").dropna().reset_index()
    soft = [name for name, row in runs.items() if row.method == "gkd-grpo" and row.family == "method"]
    return table.assign(ratio_to_gkd_grpo=table["seconds"] / table[table["run"].isin(soft)]["seconds"].median())
