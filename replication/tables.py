"""What the arms say together: every table of the study, from the arms' completions.

Means come with 95 % bootstrap intervals over seeds and prompts. Differences are paired over both, on the seeds that two
arms share; their 5 % is shared by all arms that one table sets against one rival in one measure (Bonferroni).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cmdp.statistics import FEW_RESAMPLES, MANY_RESAMPLES, RESAMPLES, bootstrap, bounds, cells, interval, with_budget
from cmdp.storage import write_table
from replication.tune import CRITERION, SETTINGS

# Methods that know no budget: one run of theirs stands at every budget of the frontier.
BLIND = ("sft", "grpo", "gkd", "gkd-grpo", "minillm", "kdrl", "worst-case", "trl-grpo", "trl-gkd")
MEASURES = {
    "accuracy": "correct",
    "csr": "satisfied",
    "accuracy_within": "correct_within",
    "validity": "valid",
    "cost": "cost",
    "kl_per_token": "kl",
    "entropy": "entropy",
    "tokens": "tokens",
    "lucky": "lucky",
}
LONGER = {"longer_accuracy": "correct", "longer_csr": "satisfied", "longer_validity": "valid"}
SHARES_OF_BUDGET = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, np.inf)


def about_arm(arm: str, arms: dict) -> dict:
    """What study/params.yaml says of an arm; a run that it does not name is a method from the usual student."""
    return arms.get(arm, {"family": "method", "run": arm, "start": "student"})


def summary(completions: pd.DataFrame, arms: dict, budget: float) -> pd.DataFrame:
    """A row an arm and measure. The CSR is that at the default budget, or at an arm's own where it asks for another."""
    teacher = completions[(completions["arm"] == "teacher") & (completions["split"] == "test")]
    words = sorted(set(" ".join(completions["style"].astype(str).unique()).split()))
    reference = phrasings(teacher, words).sum(axis=0)
    rows = []
    for arm, group in completions.groupby("arm", sort=False):
        about = about_arm(arm, arms)
        limit = about.get("set", {}).get("budget", budget) if about["family"] == "budget" else budget
        group = with_budget(group.assign(lucky=group["correct"] * (1 - group["valid"])), limit)
        test, longer = (group[group["split"] == split] for split in ("test", "longer"))
        values = {name: interval(cells(test, column)) for name, column in MEASURES.items()}
        values |= {name: interval(cells(longer, column)) for name, column in LONGER.items() if len(longer)}
        values["diversity"] = interval(_distinct(test))
        values["calibration_error"] = _resampled(test, calibration_error)
        if len(teacher):
            used = phrasings(test, words)
            values["style_distance"] = _resampled(test, lambda _, w, used=used: total_variation(w @ used, reference))
        seeds = group["seed"].nunique()
        own = (arm, about["family"], about["run"], about["start"], limit)
        rows += [(*own, name, *value, seeds) for name, value in values.items()]
    columns = ["arm", "family", "run", "start", "budget", "measure", "mean", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def frontier(completions: pd.DataFrame, arms: dict, budget: float) -> pd.DataFrame:
    """Accuracy and CSR of each method at each budget that some arm was trained for. A method that knows no budget
    stands at all of them, another at those that it was trained for (`trained_at`)."""
    tests = completions[completions["split"] == "test"]
    own = {arm: arms[arm]["set"]["budget"] for arm in arms if arms[arm]["family"] == "budget"}
    rows = []
    for arm, group in tests.groupby("arm", sort=False):
        about = about_arm(arm, arms)
        if about["family"] not in ("method", "budget") or about["start"] != "student":
            continue
        blind = arm.startswith(BLIND) and about["family"] == "method"
        for limit in sorted({budget, *own.values()}) if blind else [own.get(arm, budget)]:
            table = with_budget(group, limit)
            values = [interval(cells(table, column)) for column in ("correct", "satisfied", "correct_within")]
            flat = [number for value in values for number in value]
            rows.append((about["run"], limit, None if blind else limit, *flat, group["seed"].nunique()))
    measures = [f"{name}{end}" for name in ("accuracy", "csr", "within") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["method", "budget", "trained_at", *measures, "seeds"])


def difference(
    ours: pd.DataFrame, theirs: pd.DataFrame, column: str, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple:
    """(mean, low, high) of ours minus theirs, paired over prompts and the seeds that both have; and their number."""
    seeds = sorted(set(ours["seed"]) & set(theirs["seed"]))
    ours, theirs = (cells(table[table["seed"].isin(seeds)], column) for table in (ours, theirs))
    drawn = bootstrap(ours, resamples=resamples) - bootstrap(theirs, resamples=resamples)
    return float((ours - theirs).mean()), *bounds(drawn, level), len(seeds)


def paired(
    completions: pd.DataFrame, rivals: list[str], names: list[str], budget: float, comparisons: int | None = None
) -> pd.DataFrame:
    """Every arm of `names` minus every one of `rivals`, measure by measure: intervals for as many `comparisons`, by
    default one for each of `names`."""
    level = 1 - 0.05 / (comparisons or len(names))
    tests = with_budget(completions[completions["split"] == "test"], budget)
    by_arm, rows = dict(list(tests.groupby("arm"))), []
    for arm in (name for name in names if name in by_arm):
        for rival in (name for name in rivals if name in by_arm and name != arm):
            for measure in ("accuracy", "csr", "accuracy_within", "validity"):
                found = difference(by_arm[arm], by_arm[rival], MEASURES[measure], level, MANY_RESAMPLES)
                rows.append((arm, rival, measure, *found))
    return pd.DataFrame(rows, columns=["arm", "rival", "measure", "difference", "low", "high", "seeds"])


def ablations(completions: pd.DataFrame, arms: dict, budget: float) -> pd.DataFrame:
    """Every ablation minus the method that it changes, in the columns of `paired`. `cmdp` without Phi is a method of
    its own, `saute-constant`."""
    changed = {"saute-constant": "cmdp"} | {arm: arms[arm]["run"] for arm in arms if arms[arm]["family"] == "ablation"}
    tables = [paired(completions, [run], [arm], budget, len(changed)) for arm, run in changed.items()]
    return pd.concat(tables, ignore_index=True)


def wins(
    completions: pd.DataFrame, rivals: list[str], names: list[str], level: float = 0.95, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Reasoning win rate, judged by program: of two derivations of one problem the valid one wins; where both are or
    neither is, a tie counts half. A program's verdict does not depend on the order."""
    tests = completions[completions["split"] == "test"]
    tests = tests.assign(sample=tests.groupby(["arm", "seed", "prompt"]).cumcount())
    by_arm, rows = dict(list(tests.groupby("arm"))), []
    for arm in (name for name in names if name in by_arm):
        for rival in (name for name in rivals if name in by_arm and name != arm):
            pairs = by_arm[arm].merge(by_arm[rival], on=["seed", "prompt", "sample"], suffixes=("", "_rival"))
            score = 0.5 + 0.5 * (pairs["valid"] - pairs["valid_rival"])
            won = cells(pairs.assign(score=score), "score")
            rate = interval(won, level=level, resamples=resamples)
            rows.append((arm, rival, *rate, float((score == 0.5).mean()), pairs["seed"].nunique()))
    return pd.DataFrame(rows, columns=["arm", "rival", "win_rate", "low", "high", "ties", "seeds"])


def strength(summary: pd.DataFrame, arms: dict, tuned: dict, near: float) -> pd.DataFrame:
    """The measures of each method against its lambda, and whether accuracy within the budget is within `near` of the
    method's best."""
    rows = []
    for arm, group in summary.groupby("arm", sort=False):
        about = about_arm(arm, arms)
        method = next((name for name in ("gkd-grpo", "cmdp-hinge", "cmdp") if about["run"].startswith(name)), None)
        exact = about["run"] == method or method == "gkd-grpo"
        if method is None or not exact or about["family"] not in ("method", "strength"):
            continue
        lam = about.get("set", {}).get("lam", tuned.get(about["run"], {}).get("lam"))
        for row in group[group["measure"].isin(["accuracy", "csr", "accuracy_within"])].itertuples():
            rows.append((method, lam, row.measure, row.mean, row.low, row.high, row.seeds))
    table = pd.DataFrame(rows, columns=["method", "lam", "measure", "mean", "low", "high", "seeds"])
    within = table[table["measure"] == "accuracy_within"]
    best = within.groupby("method")["mean"].max()
    good = {(row.method, row.lam) for row in within.itertuples() if row.mean >= (1 - near) * best[row.method]}
    flags = [int((row.method, row.lam) in good) for row in table.itertuples()]
    return table.assign(near_best=flags).sort_values(["method", "measure", "lam"], ignore_index=True)


def ranges(trials: pd.DataFrame, near: float) -> pd.DataFrame:
    """What each method makes of each parameter that its trials differ in: the `best` value, the least and greatest of
    trials within `near` of the best by tuning's criterion, and of all trials; how many are near the best, of how many.

    Args:
        trials: of tuning. Those of one method's fixed weights are trials of its lambda.
    """
    rows = []
    for method, own in trials.groupby(trials["run"].str.replace("-(weak|medium|strong)$", "", regex=True), sort=False):
        best = own.loc[own[CRITERION].idxmax()]
        good = own[own[CRITERION] >= (1 - near) * best[CRITERION]]
        for name in [name for name in SETTINGS if name in own and own[name].nunique() > 1]:
            ends = (table[name].agg(end) for table in (good, own) for end in ("min", "max"))
            rows.append((method, name, best[name], *ends, len(good), len(own)))
    columns = ["method", "parameter", "best", "low", "high", "tried_low", "tried_high", "near_best", "trials"]
    return pd.DataFrame(rows, columns=columns)


def violation(completions: pd.DataFrame, names: list[str], budget: float) -> pd.DataFrame:
    """Completions by the share of the budget that they spent, C / d: what is right, valid and sure in each bin."""
    tests = completions[(completions["split"] == "test") & completions["arm"].isin(names)]
    edges, rows = np.array(SHARES_OF_BUDGET), []
    for (method, place), group in tests.groupby(
        ["arm", np.digitize(tests["cost"] / budget, edges[1:], right=True)], sort=False
    ):
        low, high = edges[place], edges[place + 1]
        label = f"over {low:g}" if np.isinf(high) else f"{low:g} to {high:g}"
        means = group[["correct", "valid", "confidence", "entropy"]].mean()
        rows.append((method, label, low, high, len(group), *means))
    columns = ["method", "bin", "low", "high", "count", "accuracy", "validity", "confidence", "entropy"]
    return pd.DataFrame(rows, columns=columns).sort_values(["method", "low"], ignore_index=True)


def timing(times: pd.DataFrame) -> pd.DataFrame:
    """Seconds a training step: median over an arm's seeds, least and greatest, and the ratio to the soft Lagrangian."""
    seconds = step_seconds(times).where(times["seconds"] > 0)
    table = seconds.groupby(times["arm"], sort=False).agg(["median", "min", "max"]).dropna().reset_index()
    table.columns = ["arm", "seconds", "low", "high"]
    soft = table[table["arm"].isin(["gkd-grpo-weak", "gkd-grpo-medium", "gkd-grpo-strong"])]["seconds"].median()
    return table.assign(ratio_to_gkd_grpo=table["seconds"] / soft)


def step_seconds(times: pd.DataFrame) -> pd.Series:
    """Seconds a step of each row: the sum of its phases' medians, which an interrupted run has too, or, for a trainer
    that logs no phases, of the whole run."""
    return times.filter(like="time/").sum(axis=1, min_count=1).fillna(times["seconds"] / times["steps"])


def calibration_error(table: pd.DataFrame, weights: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean gap between the probability of the answer given and its being right."""
    place = np.minimum((table["confidence"].to_numpy() * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights * (table["confidence"] - table["correct"]).to_numpy(), bins)
    return float(np.abs(gap).sum() / weights.sum())


def phrasings(table: pd.DataFrame, words: list[str]) -> np.ndarray:
    """How often each completion phrases an equation in each of the ways `words`: (completions, words)."""
    styles = table["style"].astype(str).str.split()
    return np.stack([styles.map(lambda style, word=word: style.count(word)).to_numpy() for word in words], axis=1)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Between two distributions, given as counts."""
    return 0.5 * float(np.abs(p / max(p.sum(), 1) - q / max(q.sum(), 1)).sum())


def _distinct(table: pd.DataFrame) -> np.ndarray:
    """In how many ways the completions of a prompt are phrased, from 0, all alike, to 1, none: (seeds, prompts)."""
    styles = table.groupby(["seed", "prompt"])["style"].agg(["nunique", "size"])
    return ((styles["nunique"] - 1) / (styles["size"] - 1).clip(lower=1)).unstack("prompt").to_numpy()


def _resampled(table: pd.DataFrame, statistic: Callable[[pd.DataFrame, np.ndarray], float]) -> tuple:
    """(value, low, high) of a statistic of weighted completions, seeds and prompts drawn anew."""
    rng = np.random.default_rng(0)
    seed, prompt = (pd.factorize(table[column])[0] for column in ("seed", "prompt"))
    draws = []
    for _ in range(FEW_RESAMPLES):
        weights = [rng.multinomial(n := codes.max() + 1, np.full(n, 1 / n))[codes] for codes in (seed, prompt)]
        draws.append(statistic(table, (weights[0] * weights[1]).astype(float)))
    return statistic(table, np.ones(len(table))), *bounds(draws)


def write_all(
    completions: pd.DataFrame, times: pd.DataFrame, trials: pd.DataFrame, params: dict, study: dict, folder: Path
) -> None:
    """Write every table of the study but the verdicts into `folder`.

    Args:
        trials: of tuning.
        params: of the default experiment, with the settings that tuning chose.
        study: study/params.yaml.
    """
    arms, budget = study["arms"], params["budget"]["budget"]
    names = [name for name in dict.fromkeys(completions["arm"]) if arms.get(name, {}).get("family") == "method"]
    rivals = [params["best"]["soft"], "grpo", "gkd", "minillm"]
    means = summary(completions, arms, budget)
    tables = {
        "summary": means,
        "frontier": frontier(completions, arms, budget),
        "paired": paired(completions, rivals, names, budget),
        "ablations": ablations(completions, arms, budget),
        "wins": wins(completions, rivals, names),
        "strength": strength(means, arms, params["runs"], study["claims"]["near"]),
        "ranges": ranges(trials, study["claims"]["near"]),
        "violation": violation(completions, [name for name in names if name != "teacher"], budget),
        "times": times,
        "timing": timing(times),
    }
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
