"""A verdict for each of the paper's claims (method, section 9), computed from results files.

The subject is `cmdp`, the paper's method as we read it. claims.yaml says what is compared with what on which measure; a
small function judges. Differences are paired over seeds and prompts; all verdicts share the 5 % (Bonferroni). A gain is

- replicated, where its interval lies above zero, though perhaps below the published figure;
- not replicated, where its interval does not, and excludes the published figure;
- inconclusive otherwise.

A bootstrap over five seeds is narrow: read a verdict that hangs on a bound's last point as inconclusive.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from cmdp.statistics import MANY_RESAMPLES, bootstrap, bounds, cells, interval, with_budget
from cmdp.storage import read_yaml, write_table
from cmdp.tasks import load_problems
from replication.experiments import EXPERIMENTS, PARAMS, RESULTS, gather, rows
from replication.tables import MEASURES, difference, ranges, read_completions, read_trials, wins

YES, NO, OPEN, UNTESTED = "replicated", "not replicated", "inconclusive", "not tested at this scale"
WEAKEST_FIRST = (NO, OPEN, YES)
SUBJECT, SOFT = "cmdp", "gkd-grpo"  # the paper's method and the soft Lagrangian
NO_OVERHEAD = 1.05  # ratio of step times up to which there is none
FEW = 3  # seeds: a comparison of single runs decides nothing
CLAIMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Study:
    """What the verdicts are computed from."""

    completions: pd.DataFrame  # `tables.read_completions`
    times: pd.DataFrame
    strengths: pd.DataFrame  # `tables.strength`
    trials: pd.DataFrame  # `tables.read_trials`
    benchmark: pd.DataFrame
    theory: dict
    steps: np.ndarray  # of each held-out problem, by its index
    soft: str  # the soft Lagrangian that did best on validation prompts
    ours: str  # the constrained variant of ours that did
    budget: float  # nats per trajectory
    settings: dict  # `claims` in experiments.yaml

    @property
    def level(self) -> float:
        """The level of each interval."""
        return 1 - 0.05 / self.settings["comparisons"]

    def runs(self, split: str = "test") -> dict[str, pd.DataFrame]:
        """The completions of a split by run, with what depends on the budget."""
        table = self.completions[self.completions["split"] == split]
        return dict(list(with_budget(table, self.budget).groupby("run")))

    def minus(self, run: str, baseline: str, measure: str) -> tuple[float, float, float]:
        """(mean, low, high) of a measure's paired difference."""
        by_run = self.runs()
        return difference(by_run[run], by_run[baseline], MEASURES[measure], self.level, MANY_RESAMPLES)[:3]

    def mean(self, table: pd.DataFrame, measure: str) -> tuple[float, float, float]:
        """(mean, low, high) of a measure."""
        return interval(cells(table, MEASURES[measure]), level=self.level, resamples=MANY_RESAMPLES)

    def sweeps(self) -> dict[str, pd.DataFrame]:
        """Accuracy within the budget by lambda, of the subject and of the soft Lagrangian."""
        table = self.strengths[self.strengths["measure"] == "accuracy_within"]
        return {method: table[table["method"] == method].sort_values("lam") for method in (SUBJECT, SOFT)}


def points(value: tuple[float, float, float]) -> str:
    """A difference of shares with its interval, in percentage points."""
    return "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * number for number in value))


def share(value: tuple[float, float, float]) -> str:
    """A share with its interval, in per cent."""
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * number for number in value))


def gain(low: float, high: float, published: float, none: float = 0.0) -> str:
    """The verdict on a claimed gain of `published`, where `none` is no gain."""
    if low > none:
        return YES
    return NO if high < published else OPEN


def over_soft(study: Study, claim: dict) -> tuple[str, str]:
    """A gain over the soft Lagrangian."""
    found, ours = (study.minus(run, study.soft, claim["measure"]) for run in (SUBJECT, study.ours))
    evidence = f"{claim.get('label', '')}{points(found)} against {study.soft}; {study.ours} (ours): {points(ours)}"
    return gain(*found[1:], claim["gain"]), evidence


def win_rate(study: Study, claim: dict) -> tuple[str, str]:
    """Pairwise win rates over each baseline; the weakest verdict counts."""
    rates = wins(study.completions, claim["baselines"], [SUBJECT, study.ours], study.level, MANY_RESAMPLES)
    own = rates[rates["run"] == SUBJECT]
    verdicts = [gain(row.low, row.high, 0.5 + claim["gain"] / 2, none=0.5) for row in own.itertuples()]
    names = {SUBJECT: SUBJECT, study.ours: f"{study.ours} (ours)"}
    said = [
        f"{names[row.run]} over {row.baseline}: {share((row.win_rate, row.low, row.high))}"
        for row in rates.itertuples()
    ]
    return min(verdicts, key=WEAKEST_FIRST.index), "; ".join(said)


def at_similar_csr(study: Study, claim: dict) -> tuple[str, str]:
    """A gain where the CSR is similar; elsewhere both differences must agree."""
    found, csr = (study.minus(SUBJECT, claim["baselines"][0], measure) for measure in (claim["measure"], "csr"))
    evidence = f"accuracy {points(found)}, CSR {points(csr)}"
    if abs(csr[0]) <= study.settings["alike"]:
        return gain(*found[1:], claim["gain"]), evidence
    verdict = YES if min(found[1], csr[1]) > 0 else NO if max(found[2], csr[2]) < 0 else OPEN
    return verdict, f"{evidence}: the constraint adherence is not similar"


def competitive(study: Study, claim: dict) -> tuple[str, str]:
    """No loss beyond the tolerance against the baseline that did best on validation prompts."""
    chosen = study.trials[(study.trials["chosen"] == 1) & study.trials["run"].isin(claim["baselines"])]
    best, tolerance = chosen.loc[chosen["accuracy"].idxmax(), "run"], study.settings["tolerance"]
    loss, ours = (study.minus(run, best, "accuracy") for run in (SUBJECT, study.ours))
    evidence = f"accuracy {points(loss)} against the best baseline on validation prompts, {best}"
    if claim["beside"] in study.runs():
        evidence += f"; against {claim['beside']}: {points(study.minus(SUBJECT, claim['beside'], 'accuracy'))}"
    verdict = YES if loss[1] > -tolerance else NO if loss[2] < -tolerance else OPEN
    return verdict, f"{evidence}; {study.ours} (ours): {points(ours)}"


def same_student(study: Study, claim: dict) -> tuple[str, str]:
    """The distilled student has the parameters of the one before, and no more."""
    before, after = (set(study.times[study.times["run"] == run]["parameters"]) for run in ("sft", SUBJECT))
    evidence = f"the distilled student has {'the' if before == after else 'not the'} parameters of the one before, "
    return YES if before == after else NO, f"{evidence}{min(after):,}, and is measured on prompts alone"


def no_overhead(study: Study, claim: dict) -> tuple[str, str]:
    """A step takes no longer than the soft Lagrangian's and dual ascent's."""
    ratios = study.benchmark.set_index("trainer").loc[[f"{SUBJECT} / {name}" for name in claim["timed"]]]
    shown = [f"{row.median:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in ratios.itertuples()]
    verdict = YES if ratios["high"].max() <= NO_OVERHEAD else NO if ratios["low"].min() > NO_OVERHEAD else OPEN
    return verdict, f"a step takes {shown[0]} of the soft Lagrangian's, {shown[1]} of dual ascent's"


def guaranteed(study: Study, claim: dict) -> tuple[str, str]:
    """The bound on violations holds on token trees, and a trained student keeps the target."""
    bound = max(found["greatest_p_over_bound"] for found in study.theory["penalty_bound"].values())
    kept, target = study.mean(study.runs()[SUBJECT], claim["measure"]), study.settings["target"]
    verdict = NO if bound > 1 or kept[2] < target else YES if kept[1] >= target else OPEN
    return verdict, (
        f"exact maximisers on token trees {'keep' if bound <= 1 else 'break'} the bound on violations (at most "
        f"{bound:.2f} of it is used); a trained student keeps {share(kept)} of its trajectories within the budget"
    )


def degrades(study: Study, claim: dict) -> tuple[str, str]:
    """A larger part of the accuracy is lost with more steps than the soft Lagrangian loses."""
    fewest, most = study.steps.min(), study.steps.max()
    losses, draws, by_run, longer = {}, {}, study.runs(), study.runs("longer")
    for run in (SUBJECT, study.soft):
        table = by_run[run].assign(steps=study.steps[by_run[run]["prompt"]])
        easy, hard = (cells(table[table["steps"] == count], "correct") for count in (fewest, most))
        # the same seeds, other prompts
        draws[run] = 1 - bootstrap(hard, resamples=MANY_RESAMPLES) / bootstrap(easy, resamples=MANY_RESAMPLES)
        losses[run] = (1 - hard.mean() / easy.mean(), *bounds(draws[run], study.level))
    mine, theirs = losses[SUBJECT], losses[study.soft]
    further = (mine[0] - theirs[0], *bounds(draws[SUBJECT] - draws[study.soft], study.level))
    shown = [run for run in (SUBJECT, study.soft, "teacher") if run in longer]
    solved = ", ".join(f"{run} solves {share(study.mean(longer[run], claim['measure']))}" for run in shown)
    return YES if further[1] > 0 else NO if further[2] < study.settings["tolerance"] else OPEN, (
        f"of its accuracy {SUBJECT} loses {share(mine)} from {fewest} to {most} steps, {study.soft} {share(theirs)}: "
        f"difference {points(further)}; of problems longer than any in training {solved}"
    )


def span(sweep: pd.DataFrame) -> tuple[float, float, bool]:
    """(low, high, at_edge): the lambdas around a method's best that are near it without a gap, and whether the best is
    the least or the greatest tried, so that the range may go on.

    Args:
        sweep: of `tables.strength`, one method's rows of one measure, by `lam`.
    """
    lam, near, best = sweep["lam"].to_numpy(), sweep["near_best"].to_numpy(), int(sweep["mean"].argmax())
    low = high = best
    while low > 0 and near[low - 1]:
        low -= 1
    while high < len(lam) - 1 and near[high + 1]:
        high += 1
    return float(lam[low]), float(lam[high]), best in (0, len(lam) - 1)


def narrow(study: Study, claim: dict) -> tuple[str, str]:
    """The range of lambda that works is narrower than the soft Lagrangian's."""
    sweeps, near = study.sweeps(), study.settings["near"]
    spans, tuned = {name: span(sweep) for name, sweep in sweeps.items()}, ranges(study.trials, near)
    tuned = tuned.drop_duplicates("method").set_index("method")
    before, least = study.runs()["sft"]["correct_within"].mean(), (1 - near) * sweeps[SUBJECT]["mean"].max()
    decided = (
        pd.concat(sweeps)["seeds"].min() >= FEW and before < least and not any(edge for *_, edge in spans.values())
    )
    width = {name: high / low for name, (low, high, _) in spans.items()}
    said = "; ".join(
        f"{name}: near its best with lambda from {low:g} to {high:g}{', its best at an edge' * at_edge}, of "
        f"{', '.join(f'{lam:g}' for lam in sweeps[name]['lam'])}, and in {tuned.loc[name, 'near_best']} of "
        f"{tuned.loc[name, 'trials']} tuning trials"
        for name, (low, high, at_edge) in spans.items()
    )
    return OPEN if not decided else YES if width[SUBJECT] < width[SOFT] else NO, (
        f"{said}; near is {100 * least:.1f} % for {SUBJECT}, and the student has {100 * before:.1f} % before training"
    )


_GAINS = (over_soft, win_rate, at_similar_csr, competitive)
JUDGES = {judge.__name__: judge for judge in (*_GAINS, same_student, no_overhead, guaranteed, degrades, narrow)}


def effort(trials: pd.DataFrame, method: str) -> str:
    """How many trials a method was tuned by, and which of the best's settings are at the edge of those tried."""
    own = trials[trials["method"] == method]
    best = own.loc[own["accuracy_within"].idxmax()]
    edges = [name for name in ("lam", "learning_rate") if best[name] in (own[name].min(), own[name].max())]
    return f"{method} the best of {len(own)} trials" + (f" (at an edge in {' and '.join(edges)})" if edges else "")


def conditions(study: Study) -> dict[str, str]:
    """What fills the braces in the claims' conditions."""
    seeds, given = pd.concat(study.sweeps())["seeds"], study.settings
    at = f"arithmetic, budget {study.budget:g} nats, {study.runs()[SUBJECT]['seed'].nunique()} seeds"
    per_cent = {"tolerance": given["tolerance"], "target": given["target"], "near": 1 - given["near"]}
    return {name: f"{100 * value:g}" for name, value in per_cent.items()} | {
        "at": at,
        "tuned": f"{at}; {effort(study.trials, SUBJECT)}, {effort(study.trials, SOFT)}",
        "turns": f"{study.benchmark['repeats'].iloc[0]}",
        "seeds": f"{seeds.min()} to {seeds.max()}",
        "soft": study.soft,
        "budget": f"{study.budget:g}",
    }


def judge(study: Study, claims: list[dict] = CLAIMS) -> pd.DataFrame:
    """The verdicts, a row each. Raises `ValueError` where a run they need is missing."""
    needed = dict.fromkeys([SUBJECT, study.ours, study.soft, *(run for c in claims for run in c.get("baselines", []))])
    if missing := [name for name in needed if name not in set(study.completions["run"])]:
        raise ValueError(f"The verdicts need the runs {missing}: run the study first (`make study`).")
    said, found = conditions(study), []
    for claim in claims:
        verdict, evidence = UNTESTED, claim.get("label", "")
        if "judge" in claim:
            verdict, evidence = JUDGES[claim["judge"]](study, claim)
        about = {name: claim[name] for name in ("id", "claim", "published")}
        conditions_met = claim["conditions"].format(**said)
        found.append({**about, "verdict": verdict, "evidence": evidence, "conditions": conditions_met})
    return pd.DataFrame(found)


def read_study(results: Path = RESULTS) -> Study:
    """What the verdicts are computed from: `results`, experiments.yaml and params.yaml."""
    params, settings = read_yaml(PARAMS), read_yaml(EXPERIMENTS)
    return Study(
        completions=read_completions(results),
        times=gather("times", rows(), results / "runs"),
        strengths=pd.read_csv(results / "study" / "strength.csv"),
        trials=read_trials(results, settings["tuning"]["trials"]),
        benchmark=pd.read_csv(results / "benchmark" / "default.csv"),
        theory=json.loads((results / "theory" / "summary.json").read_text(encoding="utf-8"))["results"],
        steps=problem_steps(params),
        **read_yaml(results / "chosen.yaml")["best"],  # soft, ours
        budget=params["budget"]["budget"],
        settings=settings["claims"],
    )


def problem_steps(params: dict) -> np.ndarray:
    """How many steps each held-out problem takes: drawn again, since results files hold no problems."""
    held_out = load_problems(params["task"])[params["evaluate"]["split"]]
    return np.array([problem["solution"].count(" ; ") for problem in held_out])


def write(results: Path = RESULTS) -> None:
    """Write results/claims.csv. Needs the study's tables (`tables.write_study`)."""
    write_table(judge(read_study(results)), results / "claims.csv")
