"""Every table computed from completions, of the default experiment (`write_default`) and the study (`write_study`).

Means come with 95 % bootstrap intervals over seeds and prompts. Differences are paired over both, on the seeds that two
runs share; their 5 % is shared by all runs that one table compares with one baseline on one measure (Bonferroni).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cmdp import statistics
from cmdp.statistics import MANY_RESAMPLES, RESAMPLES, bootstrap, bounds, cells, interval, with_budget
from cmdp.storage import provenance, read_yaml, write_json, write_table
from replication.experiments import EXPERIMENTS, PARAMS, RESULTS, Row, gather, rows
from replication.tune import CRITERION, SETTINGS

# Methods whose training no trajectory budget enters: one run of theirs serves every budget of the frontier.
BUDGET_FREE = {"sft", "grpo", "gkd", "gkd-grpo", "minillm", "kdrl", "worst-case", "trl-grpo", "trl-gkd"}
SWEPT = ("gkd-grpo", "cmdp", "cmdp-hinge")  # methods whose lambda is tuned, and varied in the study
ABLATED = {"saute-constant": "cmdp"}  # a method that is an ablation of another: cmdp without Phi
MEASURES = {"accuracy": "correct", "csr": "satisfied", "accuracy_within": "correct_within", "validity": "valid"}
MEASURES |= {"cost": "cost", "kl_per_token": "kl", "entropy": "entropy", "tokens": "tokens", "lucky": "lucky"}
COMPARED = {"accuracy": "accuracy", "csr": "CSR", "accuracy_within": "accuracy within budget", "validity": "validity"}
SHARES_OF_BUDGET = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, np.inf)


def write(part: str) -> None:
    """Compute the tables of `part`, default or study, into results/. Raises `ValueError` for another."""
    parts = {"default": write_default, "study": write_study}
    if part not in parts:
        raise ValueError(f"There are tables of {' and '.join(parts)}, not of {part!r}.")
    parts[part]()


def write_default(results: Path = RESULTS) -> None:
    """Gather the default runs: summary, metrics, training curves, cost by position, times, provenance."""
    runs = rows(part="default")
    names = ("completions", "times", "training", "positions")
    completions, times, curves, positions = (gather(name, runs, results / "runs") for name in names)
    summary = statistics.summarise(_tests(completions), **read_yaml(PARAMS)["budget"])
    phases = times.groupby("run", sort=False)[list(times.filter(like="time/"))].median().dropna(how="all")
    tables = {"summary": summary, "curves": curves, "positions": positions, "timing": phases.reset_index()}
    for name, table in tables.items():
        write_table(table, results / f"{name}.csv")
    for run, measured in summary.groupby("run"):  # a file each: `dvc metrics show` prints one line per run
        write_json(measured.set_index("measure")["mean"].round(4).to_dict(), results / "metrics" / f"{run}.json")
    write_json(provenance(), results / "provenance.json")


def write_study(results: Path = RESULTS) -> None:
    """Every table of the study but the verdicts (`claims.write`)."""
    settings, chosen = read_yaml(EXPERIMENTS), read_yaml(results / "chosen.yaml")
    budget, near = read_yaml(PARAMS)["budget"]["budget"], settings["claims"]["near"]
    runs, completions = by_name(rows()), read_completions(results)
    names = [name for name, row in runs.items() if row.family == "method"]
    baselines = [chosen["best"]["soft"], "grpo", "gkd", "minillm"]
    means = summary(completions, runs, budget)
    tables = {
        "summary": means,
        "frontier": frontier(completions, runs, budget),
        "paired": paired(completions, baselines, names, budget),
        "ablations": ablations(completions, runs, budget),
        "wins": wins(completions, baselines, names),
        "strength": strength(means, runs, chosen["runs"], near),
        "ranges": ranges(read_trials(results, settings["tuning"]["trials"]), near),
        "violation": violation(completions, [name for name in names if runs[name].start != "teacher"], budget),
        "timing": timing(gather("times", rows(), results / "runs"), runs),
    }
    for name, table in tables.items():
        write_table(table, results / "study" / f"{name}.csv")


def by_name(table: dict[str, Row]) -> dict[str, Row]:
    """The runs by name: the first of those pooled under one name."""
    named: dict[str, Row] = {}
    return {row.name: named.setdefault(row.name, row) for row in table.values()}


def read_completions(results: Path = RESULTS) -> pd.DataFrame:
    """Every sampled completion of the default runs and of the study, with its `run`."""
    completions = gather("completions", rows(), results / "runs")
    return completions[completions["decoding"] != "greedy"]


def read_trials(results: Path, tuned: dict[str, dict]) -> pd.DataFrame:
    """The trials of tuning with the `method` that each run of `tuned` (experiments.yaml) trains."""
    trials = pd.read_csv(results / "tuning.csv")
    return trials.assign(method=[tuned[run]["method"] for run in trials["run"]])


def summary(completions: pd.DataFrame, runs: dict[str, Row], budget: float) -> pd.DataFrame:
    """One row per run and measure. The CSR is at the default budget, or at the run's own where it varies the budget."""
    teacher = _tests(completions[completions["run"] == "teacher"])
    words = sorted(set(" ".join(completions["style"].astype(str).unique()).split()))
    reference = phrasings(teacher, words).sum(axis=0)
    found = []
    for run, group in completions.groupby("run", sort=False):
        row = runs[run]
        limit = row.settings["budget"] if row.family == "budget" else budget
        group = with_budget(group.assign(lucky=group["correct"] * (1 - group["valid"])), limit)
        test, longer = _tests(group), group[group["split"] == "longer"]
        values = {name: interval(cells(test, column)) for name, column in MEASURES.items()}
        for name in ("accuracy", "csr", "validity") if len(longer) else ():
            values[f"longer_{name}"] = interval(cells(longer, MEASURES[name]))
        styles = test.groupby(["seed", "prompt"])["style"].agg(["nunique", "size"])
        varied = (styles["nunique"] - 1) / (styles["size"] - 1).clip(lower=1)  # 0: phrased alike, 1: all differently
        values["diversity"] = interval(varied.unstack("prompt").to_numpy())
        values["calibration_error"] = _resampled(test, calibration_error)
        if len(teacher):
            used = phrasings(test, words)
            values["style_distance"] = _resampled(test, lambda _, w, used=used: total_variation(w @ used, reference))
        about, seeds = (run, row.family, row.tuned, row.start, limit), group["seed"].nunique()
        found += [(*about, name, *value, seeds) for name, value in values.items()]
    columns = ["run", "family", "tuned", "start", "budget", "measure", "mean", "low", "high", "seeds"]
    return pd.DataFrame(found, columns=columns)


def frontier(completions: pd.DataFrame, runs: dict[str, Row], budget: float) -> pd.DataFrame:
    """Accuracy and CSR of each method at each budget some run was trained for. A method that knows no budget stands at
    all of them, another at those it was trained for (`trained_at`)."""
    own = {name: row.settings["budget"] for name, row in runs.items() if row.family == "budget"}
    found = []
    for run, group in _tests(completions).groupby("run", sort=False):
        row, free = runs[run], runs[run].method in BUDGET_FREE
        if row.family not in ("method", "budget") or row.start != "student":
            continue
        for limit in sorted({budget, *own.values()}) if free else [own.get(run, budget)]:
            table, values = with_budget(group, limit), []
            for column in ("correct", "satisfied", "correct_within"):
                values += interval(cells(table, column))
            found.append((row.tuned, limit, None if free else limit, *values, group["seed"].nunique()))
    measures = [f"{name}{end}" for name in ("accuracy", "csr", "within") for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=["method", "budget", "trained_at", *measures, "seeds"])


def difference(
    ours: pd.DataFrame, theirs: pd.DataFrame, column: str, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float, float, int]:
    """(mean, low, high, seeds) of ours minus theirs, paired over prompts and the seeds that both have."""
    seeds = sorted(set(ours["seed"]) & set(theirs["seed"]))
    ours, theirs = (cells(table[table["seed"].isin(seeds)], column) for table in (ours, theirs))
    drawn = bootstrap(ours, resamples=resamples) - bootstrap(theirs, resamples=resamples)
    return float((ours - theirs).mean()), *bounds(drawn, level), len(seeds)


def paired(
    completions: pd.DataFrame, baselines: list[str], names: list[str], budget: float, comparisons: int | None = None
) -> pd.DataFrame:
    """Every run of `names` minus every one of `baselines`, measure by measure, where both were run, at a budget in nats
    per trajectory; as many `comparisons` share the 5 %, by default one for each of `names`."""
    level = 1 - 0.05 / (comparisons or len(names))
    found = []
    for run, baseline, *both in _pairs(with_budget(_tests(completions), budget), names, baselines):
        values = {name: difference(*both, MEASURES[name], level, MANY_RESAMPLES) for name in COMPARED}
        found += [(run, baseline, name, *value) for name, value in values.items()]
    return pd.DataFrame(found, columns=["run", "baseline", "measure", "difference", "low", "high", "seeds"])


def ablations(completions: pd.DataFrame, runs: dict[str, Row], budget: float) -> pd.DataFrame:
    """Every ablation minus the run it changes, in the columns of `paired`."""
    changed = ABLATED | {name: row.tuned for name, row in runs.items() if row.family == "ablation"}
    tables = [paired(completions, [of], [run], budget, len(changed)) for run, of in changed.items()]
    return pd.concat(tables, ignore_index=True)


def wins(
    completions: pd.DataFrame, baselines: list[str], names: list[str], level: float = 0.95, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Reasoning win rate, judged by program: of two derivations of one problem the valid one wins; where both or
    neither are, a tie counts half. The order of the two does not enter."""
    tests, found = _tests(completions), []
    tests = tests.assign(sample=tests.groupby(["run", "seed", "prompt"]).cumcount())
    for run, baseline, ours, theirs in _pairs(tests, names, baselines):
        pairs = ours.merge(theirs, on=["seed", "prompt", "sample"], suffixes=("", "_baseline"))
        score = 0.5 + 0.5 * (pairs["valid"] - pairs["valid_baseline"])
        rate = interval(cells(pairs.assign(score=score), "score"), level=level, resamples=resamples)
        found.append((run, baseline, *rate, float((score == 0.5).mean()), pairs["seed"].nunique()))
    return pd.DataFrame(found, columns=["run", "baseline", "win_rate", "low", "high", "ties", "seeds"])


def strength(summary: pd.DataFrame, runs: dict[str, Row], chosen: dict[str, dict], near: float) -> pd.DataFrame:
    """Each method's measures by lambda, its own or what was `chosen` for its run, and whether accuracy within budget is
    within `near` of its best."""
    swept = {run: row for run, row in runs.items() if row.method in SWEPT and row.family in ("method", "strength")}
    lam = {run: row.settings.get("lam", chosen.get(row.tuned, {}).get("lam")) for run, row in swept.items()}
    table = summary[summary["run"].isin(swept) & summary["measure"].isin(["accuracy", "csr", "accuracy_within"])]
    table = table.assign(method=[swept[run].method for run in table["run"]], lam=table["run"].map(lam))
    within = table[table["measure"] == "accuracy_within"].set_index(["method", "lam"])["mean"]
    good = within.index[within >= (1 - near) * within.groupby("method").transform("max")]
    table["near_best"] = table.set_index(["method", "lam"]).index.isin(good).astype(int)
    columns = ["method", "lam", "measure", "mean", "low", "high", "seeds", "near_best"]
    return table[columns].sort_values(["method", "measure", "lam"], ignore_index=True)


def ranges(trials: pd.DataFrame, near: float) -> pd.DataFrame:
    """For each method and parameter its trials (`read_trials`) differ in: the `best` value, the least and greatest of
    the trials within `near` of the best by tuning's criterion and of all, and how many are near it, of how many."""
    found = []
    for method, own in trials.groupby("method", sort=False):
        best = own.loc[own[CRITERION].idxmax()]
        good = own[own[CRITERION] >= (1 - near) * best[CRITERION]]
        for name in [name for name in SETTINGS if name in own and own[name].nunique() > 1]:
            ends = (table[name].agg(end) for table in (good, own) for end in ("min", "max"))
            found.append((method, name, best[name], *ends, len(good), len(own)))
    columns = ["method", "parameter", "best", "low", "high", "tried_low", "tried_high", "near_best", "trials"]
    return pd.DataFrame(found, columns=columns)


def violation(completions: pd.DataFrame, names: list[str], budget: float) -> pd.DataFrame:
    """Accuracy, validity, confidence and entropy of completions by the share of the budget they spent, C / d."""
    tests, edges = _tests(completions[completions["run"].isin(names)]), np.array(SHARES_OF_BUDGET)
    place = np.digitize(tests["cost"] / budget, edges[1:], right=True)
    measures = {"correct": "accuracy", "valid": "validity", "confidence": "confidence", "entropy": "entropy"}
    grouped = tests.assign(low=edges[place], high=edges[place + 1]).groupby(["run", "low", "high"])[[*measures]]
    table = grouped.mean().rename(columns=measures).assign(count=grouped.size()).reset_index()
    labels = zip(table["low"], table["high"], strict=True)
    table["bin"] = [f"over {low:g}" if np.isinf(high) else f"{low:g} to {high:g}" for low, high in labels]
    return table[["run", "bin", "low", "high", "count", *measures.values()]]


def timing(times: pd.DataFrame, runs: dict[str, Row]) -> pd.DataFrame:
    """Seconds per training step: median, least and greatest over a run's seeds, and the ratio to the soft Lagrangian. A
    seed's time is the sum of its phases' medians, or of a trainer that logs no phases the mean over the run."""
    seconds = times.filter(like="time/").sum(axis=1, min_count=1).fillna(times["seconds"] / times["steps"])
    grouped = seconds.where(times["seconds"] > 0).groupby(times["run"], sort=False)
    table = grouped.agg(seconds="median", low="min", high="max").dropna().reset_index()
    soft = [name for name, row in runs.items() if row.method == "gkd-grpo" and row.family == "method"]
    return table.assign(ratio_to_gkd_grpo=table["seconds"] / table[table["run"].isin(soft)]["seconds"].median())


def calibration_error(table: pd.DataFrame, weights: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean gap between the answer's probability and whether it is correct."""
    place = np.minimum((table["confidence"].to_numpy() * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights * (table["confidence"] - table["correct"]).to_numpy(), bins)
    return float(np.abs(gap).sum() / weights.sum())


def phrasings(table: pd.DataFrame, words: list[str]) -> np.ndarray:
    """How often each completion phrases an equation in each of the ways `words`: (completions, words)."""
    styles = [style.split() for style in table["style"].astype(str)]
    return np.array([[style.count(word) for word in words] for style in styles]).reshape(len(styles), len(words))


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation distance of two distributions, given as counts."""
    return 0.5 * float(np.abs(p / max(p.sum(), 1) - q / max(q.sum(), 1)).sum())


def _tests(completions: pd.DataFrame) -> pd.DataFrame:
    return completions[completions["split"] == "test"]


def _pairs(table: pd.DataFrame, names: list[str], baselines: list[str]) -> list[tuple]:
    """(run, baseline, completions of the run, of the baseline) of each two that were run."""
    by_run = dict(list(table.groupby("run")))
    both = [(a, b) for a in names for b in baselines if a != b and {a, b} <= set(by_run)]
    return [(run, baseline, by_run[run], by_run[baseline]) for run, baseline in both]


def _resampled(table: pd.DataFrame, statistic: Callable[[pd.DataFrame, np.ndarray], float]) -> tuple:
    """(value, low, high) of a statistic of weighted completions, with seeds and prompts resampled."""
    rng = np.random.default_rng(0)
    seed, prompt = (pd.factorize(table[column])[0] for column in ("seed", "prompt"))
    draws = []
    for _ in range(statistics.FEW_RESAMPLES):
        weights = [rng.multinomial(n := codes.max() + 1, np.full(n, 1 / n))[codes] for codes in (seed, prompt)]
        draws.append(statistic(table, (weights[0] * weights[1]).astype(float)))
    return statistic(table, np.ones(len(table))), *bounds(draws)
