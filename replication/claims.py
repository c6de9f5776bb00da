"""A verdict for each of the paper's claims (method, section 9) and for two of ours, computed from results files.

claims.yaml says what is compared on which measure and in which words; a small function judges, by `gain` where it can.
Differences are paired over seeds and prompts; the verdicts on the paper's claims share the 5 % (Bonferroni), ours take
the intervals of `tables.equal_csr`. docs/study.md says how to read them.
"""

import itertools
import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from cmdp.statistics import MANY_RESAMPLES, bootstrap, bounds, cells, interval, with_budget
from cmdp.storage import read_yaml, write_table
from replication.experiments import EXPERIMENTS, PARAMS, RESULTS, Row, gather, rows
from replication.tables import MEASURES, by_name, difference, equal_csr, read_completions, soft_lambdas, spelled, wins
from replication.tune import ROLES, under_constraint

YES, NO, OPEN, UNTESTED = "replicated", "not replicated", "inconclusive", "not tested at this scale"
ORDER = (NO, OPEN, YES).index
SUPPORTED = {YES: "supported", NO: "not supported", OPEN: OPEN}  # the verdicts on claims of ours
NO_OVERHEAD = 1.05  # ratio of step times up to which there is none
CLAIMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass
class Study:
    """What the verdicts are computed from."""

    completions: pd.DataFrame  # `tables.read_completions`, sampled
    times: pd.DataFrame
    trials: pd.DataFrame  # results/tuning.csv, with the `method` of each run
    equal: pd.DataFrame  # `tables.equal_csr`
    benchmark: pd.DataFrame
    theory: dict
    steps: np.ndarray  # of each held-out problem, by its index
    rows: dict[str, Row]  # by name
    lambdas: dict[str, float]  # `tables.soft_lambdas`
    soft: str  # the best soft Lagrangian on validation prompts
    subject: str  # the paper's method at its best settings
    ours: str  # the constrained method of ours
    budget: float  # nats per trajectory
    settings: dict  # `claims` in experiments.yaml

    @property
    def level(self) -> float:
        """The level of each interval."""
        return 1 - 0.05 / self.settings["comparisons"]

    @cached_property
    def runs(self) -> dict[str, pd.DataFrame]:
        """The completions by run, with what depends on the budget."""
        return dict(list(with_budget(self.completions, self.budget).groupby("run")))

    def minus(self, run: str, baseline: str, measure: str) -> tuple[float, float, float]:
        """(mean, low, high) of a measure's paired difference."""
        return difference(self.runs[run], self.runs[baseline], MEASURES[measure], self.level)[:3]


share = partial(spelled, unit=" %", spec=".1f")
points = partial(spelled, unit=" points", spec="+.1f")  # a difference of shares


def gain(low: float, high: float, published: float, none: float = 0.0) -> str:
    """The verdict on a claimed gain of `published`, where `none` is no gain: replicated where the interval lies above
    none, though perhaps below the published figure; not replicated where it does not, and excludes that figure."""
    return YES if low > none else NO if high < published else OPEN


def over_soft(study: Study, claim: dict) -> tuple[str, dict]:
    """A gain over the soft Lagrangian."""
    found, ours = (study.minus(run, study.soft, claim["measure"]) for run in (study.subject, study.ours))
    return gain(*found[1:], claim["gain"]), {"found": points(found), "ours": points(ours)}


def at_equal_csr(study: Study, claim: dict) -> tuple[str, dict]:
    """A gain over the soft Lagrangian's curve at the CSR of the run itself; none can be told where it is looser."""
    runs = {run: study.rows[run] for run in (study.subject, study.ours, *study.lambdas)}
    given = (study.lambdas, study.budget, study.settings["target"], claim["measure"], study.level)
    table = equal_csr(study.completions, runs, *given).set_index("run")
    found, ours = (table.loc[run, ["difference", "low", "high"]] for run in (study.subject, study.ours))
    csr, place = table.loc[study.subject, ["csr", "place"]]
    where = f"{100 * csr:.1f} %, {place}{' than' * (place != 'within')} the curve"
    verdict = OPEN if found.isna().any() else gain(found["low"], found["high"], claim["gain"])
    return verdict, {"found": points(found), "ours": points(ours), "csr": where}


def win_rate(study: Study, claim: dict) -> tuple[str, dict]:
    """Pairwise win rates over each baseline; the weakest verdict counts."""
    pairs = itertools.product((study.subject, study.ours), claim["baselines"])
    rates, verdicts, said = wins(study.completions, pairs, study.level, MANY_RESAMPLES), [], []
    for run, baseline, *rate in rates[["run", "baseline", "win_rate", "low", "high"]].to_numpy():
        said.append(f"{run}{' (ours)' * (run == study.ours)} over {baseline}: {share(rate)}")
        verdicts += [gain(*rate[1:], 0.5 + claim["gain"] / 2, none=0.5)] if run == study.subject else []
    return min(verdicts, key=ORDER), {"rates": "; ".join(said)}


def at_similar_csr(study: Study, claim: dict) -> tuple[str, dict]:
    """A gain where the CSR is similar; elsewhere both differences must agree."""
    found, csr = (study.minus(study.subject, claim["baselines"][0], measure) for measure in (claim["measure"], "csr"))
    said = {"found": points(found), "csr": points(csr), "unlike": ""}
    if abs(csr[0]) <= study.settings["alike"]:
        return gain(*found[1:], claim["gain"]), said
    both = gain(min(found[1], csr[1]), max(found[2], csr[2]), 0)
    return both, said | {"unlike": ": the constraint adherence is not similar"}


def competitive(study: Study, claim: dict) -> tuple[str, dict]:
    """No loss beyond the tolerance against the baseline that did best under the constraint on validation prompts."""
    chosen = study.trials[(study.trials["chosen"] == 1) & study.trials["run"].isin(claim["baselines"])]
    best = chosen.loc[under_constraint(chosen, study.settings["target"]).idxmax(), "run"]
    loss, ours = (study.minus(run, best, "accuracy") for run in (study.subject, study.ours))
    beside = [f"against {run}: {points(study.minus(study.subject, run, 'accuracy'))}" for run in claim["beside"]]
    said = {"found": points(loss), "best": best, "beside": "; ".join(beside), "ours": points(ours)}
    return gain(*loss[1:], -study.settings["tolerance"], -study.settings["tolerance"]), said


def same_student(study: Study, claim: dict) -> tuple[str, dict]:
    """The distilled student has the parameters of the one before, and no more."""
    before, after = (set(study.times[study.times["run"] == run]["parameters"]) for run in ("sft", study.subject))
    return YES if before == after else NO, {"the": "the" if before == after else "not the", "count": min(after)}


def no_overhead(study: Study, claim: dict) -> tuple[str, dict]:
    """A step takes no longer than the soft Lagrangian's and dual ascent's."""
    ratios = study.benchmark.set_index("trainer").loc[[f"{ROLES['subject']} / {name}" for name in claim["timed"]]]
    verdict = YES if ratios["high"].max() <= NO_OVERHEAD else NO if ratios["low"].min() > NO_OVERHEAD else OPEN
    return verdict, {"ratios": [f"{row.median:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in ratios.itertuples()]}


def guaranteed(study: Study, claim: dict) -> tuple[str, dict]:
    """The bound on violations holds on token trees, and a trained student keeps the target."""
    bound = pd.DataFrame(study.theory["penalty_bound"]).loc["greatest_p_over_bound"].max()
    runs = (cells(study.runs[run], MEASURES[claim["measure"]]) for run in (study.subject, study.ours))
    kept, ours = (interval(csr, level=study.level, resamples=MANY_RESAMPLES) for csr in runs)
    target = study.settings["target"]
    verdict = NO if bound > 1 or kept[2] < target else YES if kept[1] >= target else OPEN
    said = {"keep": "keep" if bound <= 1 else "break", "bound": bound, "kept": share(kept), "ours": share(ours)}
    return verdict, said


def degrades(study: Study, claim: dict) -> tuple[str, dict]:
    """A larger part of the accuracy is lost with more steps than the soft Lagrangian loses."""
    said, means, draws = {"fewest": study.steps.min(), "most": study.steps.max()}, {}, {}
    for run in (study.subject, study.soft):
        table, column = study.runs[run], MEASURES[claim["measure"]]
        easy, hard = (cells(table[study.steps[table["prompt"]] == count], column) for count in said.values())
        means[run] = 1 - hard.mean() / easy.mean()  # below: the same seeds, other prompts
        draws[run] = 1 - bootstrap(hard, resamples=MANY_RESAMPLES) / bootstrap(easy, resamples=MANY_RESAMPLES)
    mine, theirs = ((means[run], *bounds(draws[run], study.level)) for run in means)
    further = (mine[0] - theirs[0], *bounds(draws[study.subject] - draws[study.soft], study.level))
    said |= {"mine": share(mine), "theirs": share(theirs), "further": points(further)}
    return gain(*further[1:], study.settings["tolerance"]), said


def careful_tuning(study: Study, claim: dict) -> tuple[str, dict]:
    """Fewer of its tuning trials work than of the soft Lagrangian's; less than one trial's difference decides nothing.

    A trial works where it keeps the target and is near the best accuracy of the role's trials that do.
    """
    parts, said = {}, {}
    for role, method in ROLES.items():
        own = study.trials[study.trials["run"] == study.subject] if role == "subject" else study.trials
        own = under_constraint(own[own["method"] == method], study.settings["target"])
        works = own >= max((1 - study.settings["near"]) * own.max(), 0)
        parts[role], said[f"{role}_works"] = works.mean(), f"{works.sum()} of {len(own)}"
    trial = 1 / study.trials["run"].value_counts()[study.subject]
    verdict = NO if parts["subject"] >= parts["soft"] else YES if parts["subject"] + trial <= parts["soft"] else OPEN
    return verdict, said


def at_budgets(study: Study, claim: dict) -> tuple[str, dict]:
    """At `every` budget it keeps the target and loses no accuracy, beyond the tolerance, to the soft Lagrangian at
    equal CSR; or else it is more accurate at one or more."""
    own = study.equal[study.equal["method"] == study.ours].sort_values("budget")
    target, tolerance, said, every, better = study.settings["target"], study.settings["tolerance"], [], [], []
    for row in own.itertuples():
        every += [gain(row.csr_low, row.csr_high, target, target), gain(row.low, row.high, -tolerance, -tolerance)]
        better.append(gain(row.low, row.high, 0.0))
        csr, found = share((row.csr, row.csr_low, row.csr_high)), points((row.difference, row.low, row.high))
        single = f"lambda {row.soft_lambda:g} {points((row.target_difference, row.target_low, row.target_high))}"
        said.append(f"{row.budget:g} nats: CSR {csr}, at equal CSR {found}, against {single}")
    verdict = min(every, key=ORDER) if claim["every"] else max(better, key=ORDER)
    return SUPPORTED[verdict], {"budgets": "; ".join(said)}


_JUDGES = (over_soft, at_equal_csr, win_rate, at_similar_csr, competitive, same_student, no_overhead, guaranteed)
JUDGES = {judge.__name__: judge for judge in (*_JUDGES, degrades, careful_tuning, at_budgets)}


def judge(study: Study, claims: list[dict] = CLAIMS) -> pd.DataFrame:
    """The verdicts, a row each; the words of claims.yaml are filled with what the study is and what each judge found.
    Raises `ValueError` where a run they need is missing."""
    needed = [study.subject, study.ours, study.soft, *(run for claim in claims for run in claim.get("baselines", []))]
    if missing := [name for name in dict.fromkeys(needed) if name not in set(study.completions["run"])]:
        raise ValueError(f"The verdicts need the runs {missing}: run the study first (`make study`).")
    given, trials = study.settings, study.trials["run"].value_counts()[study.subject]
    size = study.times.set_index("run")["parameters"][study.subject].min()
    scale = f"arithmetic, a student of {size:,} parameters, {study.runs[study.subject]['seed'].nunique()} seeds"
    at = f"{scale}, budget {study.budget:g} nats"
    said = {name: f"{100 * value:g}" for name, value in (given | {"near": 1 - given["near"]}).items()}
    said |= {"soft": study.soft, "subject": study.subject, "variant": study.ours, "budget": f"{study.budget:g}"}
    said |= {"scale": scale, "at": at, "tuned": f"{at}; each the best of {trials} trials"}
    said["turns"], found = study.benchmark["repeats"].iloc[0], []
    for claim in claims:
        verdict, values = JUDGES[claim["judge"]](study, claim) if "judge" in claim else (UNTESTED, {})
        words = {name: claim[name].format_map(said | values) for name in ("evidence", "conditions")}
        found.append({name: claim[name] for name in ("id", "claim", "published")} | {"verdict": verdict} | words)
    return pd.DataFrame(found)


def read_study(results: Path = RESULTS) -> Study:
    """What the verdicts are computed from: `results`, experiments.yaml and params.yaml."""
    settings, chosen, named = read_yaml(EXPERIMENTS), read_yaml(results / "chosen.yaml"), by_name(rows())
    entries, trials = settings["tuning"]["entries"], pd.read_csv(results / "tuning.csv")
    completions, exact = read_completions(results), gather("exact", rows(part="default"), results / "runs")
    return Study(
        completions=completions[completions["decoding"] == "sampled"],
        times=gather("times", rows(), results / "runs"),
        trials=trials.assign(method=[entries[run]["method"] for run in trials["run"]]),
        equal=pd.read_csv(results / "study" / "equal_csr.csv"),
        benchmark=pd.read_csv(results / "benchmark" / "default.csv"),
        theory=json.loads((results / "theory" / "summary.json").read_text(encoding="utf-8"))["results"],
        steps=exact.groupby("prompt").first().filter(like="step_").notna().sum(axis=1).to_numpy(),
        rows=named,
        lambdas=soft_lambdas(named, chosen["runs"]),
        **chosen["best"],  # soft, subject, ours
        budget=read_yaml(PARAMS)["budget"]["budget"],
        settings=settings["claims"],
    )


def write(results: Path = RESULTS) -> None:
    """Write results/claims.csv. Needs the study's tables (`tables.write_study`)."""
    write_table(judge(read_study(results)), results / "claims.csv")
