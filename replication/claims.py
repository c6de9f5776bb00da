"""A verdict for each of the paper's claims (method, section 9), computed from results files.

The subject is `cmdp`, the paper's method as we read it. claims.yaml says what is compared on which measure and in which
words; a small function judges. Differences are paired over seeds and prompts; all verdicts share the 5 % (Bonferroni).
A gain is

- replicated, where its interval lies above zero, though perhaps below the published figure;
- not replicated, where its interval does not, and excludes the published figure;
- inconclusive otherwise.

A bootstrap over five seeds is narrow: read a verdict that hangs on a bound's last point as inconclusive.
"""

import json
from dataclasses import dataclass
from functools import cached_property, partial
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
SUBJECT, SOFT = "cmdp", "gkd-grpo"  # the paper's method and the soft Lagrangian
NO_OVERHEAD = 1.05  # ratio of step times up to which there is none
FEW = 3  # seeds: a comparison of single runs decides nothing
CLAIMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass
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

    @cached_property
    def runs(self) -> dict[str, dict[str, pd.DataFrame]]:
        """The completions by split (test, longer) and run, with what depends on the budget."""
        splits = with_budget(self.completions, self.budget).groupby("split")
        return {split: dict(list(table.groupby("run"))) for split, table in splits}

    def minus(self, run: str, baseline: str, measure: str) -> tuple[float, float, float]:
        """(mean, low, high) of a measure's paired difference."""
        ours, theirs = self.runs["test"][run], self.runs["test"][baseline]
        return difference(ours, theirs, MEASURES[measure], self.level, MANY_RESAMPLES)[:3]

    def mean(self, table: pd.DataFrame, measure: str) -> tuple[float, float, float]:
        """(mean, low, high) of a measure."""
        return interval(cells(table, MEASURES[measure]), level=self.level, resamples=MANY_RESAMPLES)

    @property
    def sweeps(self) -> dict[str, pd.DataFrame]:
        """Accuracy within the budget by lambda, of the subject and of the soft Lagrangian."""
        table = self.strengths[self.strengths["measure"] == "accuracy_within"]
        return {method: table[table["method"] == method].sort_values("lam") for method in (SUBJECT, SOFT)}


def share(value: tuple[float, float, float], form: str = "{:.1f} % [{:.1f}, {:.1f}]") -> str:
    """A share with its interval, in per cent."""
    return form.format(*(100 * number for number in value))


points = partial(share, form="{:+.1f} points [{:+.1f}, {:+.1f}]")  # a difference of shares


def gain(low: float, high: float, published: float, none: float = 0.0) -> str:
    """The verdict on a claimed gain of `published`, where `none` is no gain."""
    return YES if low > none else NO if high < published else OPEN


def over_soft(study: Study, claim: dict) -> tuple[str, dict]:
    """A gain over the soft Lagrangian."""
    found, ours = (study.minus(run, study.soft, claim["measure"]) for run in (SUBJECT, study.ours))
    return gain(*found[1:], claim["gain"]), {"found": points(found), "ours": points(ours)}


def win_rate(study: Study, claim: dict) -> tuple[str, dict]:
    """Pairwise win rates over each baseline; the weakest verdict counts."""
    rates = wins(study.completions, claim["baselines"], [SUBJECT, study.ours], study.level, MANY_RESAMPLES)
    verdicts, said = [], []
    for run, baseline, *rate in rates[["run", "baseline", "win_rate", "low", "high"]].to_numpy():
        said.append(f"{run}{' (ours)' * (run != SUBJECT)} over {baseline}: {share(rate)}")
        verdicts += [gain(*rate[1:], 0.5 + claim["gain"] / 2, none=0.5)] if run == SUBJECT else []
    return min(verdicts, key=(NO, OPEN, YES).index), {"rates": "; ".join(said)}


def at_similar_csr(study: Study, claim: dict) -> tuple[str, dict]:
    """A gain where the CSR is similar; elsewhere both differences must agree."""
    found, csr = (study.minus(SUBJECT, claim["baselines"][0], measure) for measure in (claim["measure"], "csr"))
    said = {"found": points(found), "csr": points(csr), "unlike": ""}
    if abs(csr[0]) <= study.settings["alike"]:
        return gain(*found[1:], claim["gain"]), said
    both = gain(min(found[1], csr[1]), max(found[2], csr[2]), 0)
    return both, said | {"unlike": ": the constraint adherence is not similar"}


def competitive(study: Study, claim: dict) -> tuple[str, dict]:
    """No loss beyond the tolerance against the baseline that did best on validation prompts."""
    chosen = study.trials[(study.trials["chosen"] == 1) & study.trials["run"].isin(claim["baselines"])]
    best, tolerance = chosen.loc[chosen["accuracy"].idxmax(), "run"], study.settings["tolerance"]
    loss, ours = (study.minus(run, best, "accuracy") for run in (SUBJECT, study.ours))
    other = [run for run in [claim["beside"]] if run in study.runs["test"]]
    beside = "".join(f"; against {run}: {points(study.minus(SUBJECT, run, 'accuracy'))}" for run in other)
    said = {"found": points(loss), "best": best, "beside": beside, "ours": points(ours)}
    return gain(*loss[1:], -tolerance, -tolerance), said


def same_student(study: Study, claim: dict) -> tuple[str, dict]:
    """The distilled student has the parameters of the one before, and no more."""
    before, after = (set(study.times[study.times["run"] == run]["parameters"]) for run in ("sft", SUBJECT))
    return YES if before == after else NO, {"the": "the" if before == after else "not the", "count": min(after)}


def no_overhead(study: Study, claim: dict) -> tuple[str, dict]:
    """A step takes no longer than the soft Lagrangian's and dual ascent's."""
    ratios = study.benchmark.set_index("trainer").loc[[f"{SUBJECT} / {name}" for name in claim["timed"]]]
    verdict = YES if ratios["high"].max() <= NO_OVERHEAD else NO if ratios["low"].min() > NO_OVERHEAD else OPEN
    return verdict, {"ratios": [f"{row.median:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in ratios.itertuples()]}


def guaranteed(study: Study, claim: dict) -> tuple[str, dict]:
    """The bound on violations holds on token trees, and a trained student keeps the target."""
    bound = max(found["greatest_p_over_bound"] for found in study.theory["penalty_bound"].values())
    kept, target = study.mean(study.runs["test"][SUBJECT], claim["measure"]), study.settings["target"]
    verdict = NO if bound > 1 or kept[2] < target else YES if kept[1] >= target else OPEN
    return verdict, {"keep": "keep" if bound <= 1 else "break", "bound": bound, "kept": share(kept)}


def degrades(study: Study, claim: dict) -> tuple[str, dict]:
    """A larger part of the accuracy is lost with more steps than the soft Lagrangian loses."""
    said, means, draws = {"fewest": study.steps.min(), "most": study.steps.max()}, {}, {}
    for run in (SUBJECT, study.soft):
        table = study.runs["test"][run]
        easy, hard = (cells(table[study.steps[table["prompt"]] == count], "correct") for count in said.values())
        means[run] = 1 - hard.mean() / easy.mean()  # below: the same seeds, other prompts
        draws[run] = 1 - bootstrap(hard, resamples=MANY_RESAMPLES) / bootstrap(easy, resamples=MANY_RESAMPLES)
    mine, theirs = ((means[run], *bounds(draws[run], study.level)) for run in means)
    further = (mine[0] - theirs[0], *bounds(draws[SUBJECT] - draws[study.soft], study.level))
    longer = {run: study.runs["longer"].get(run) for run in (SUBJECT, study.soft, "teacher")}
    solved = [f"{run} solves {share(study.mean(of, claim['measure']))}" for run, of in longer.items() if of is not None]
    said |= {"mine": share(mine), "theirs": share(theirs), "further": points(further), "solved": ", ".join(solved)}
    return gain(*further[1:], study.settings["tolerance"]), said


def span(sweep: pd.DataFrame) -> tuple[float, float, bool]:
    """(low, high, at_edge) of a method's rows of `tables.strength` by `lam`: the lambdas around its best that are near
    it without a gap, and whether the best is the least or the greatest tried, so that the range may go on."""
    sweep, best = sweep.reset_index(drop=True), int(sweep["mean"].argmax())
    stretch = (sweep["near_best"] == 0).cumsum()  # one number from a gap to the next
    lam = sweep["lam"][(sweep["near_best"] == 1) & (stretch == stretch[best])]
    return float(lam.min()), float(lam.max()), best in (0, len(sweep) - 1)


def narrow(study: Study, claim: dict) -> tuple[str, dict]:
    """The range of lambda that works is narrower than the soft Lagrangian's."""
    sweeps, near, said, width, edges = study.sweeps, study.settings["near"], "", {}, []
    tuned = ranges(study.trials, near).drop_duplicates("method").set_index("method")
    for name, sweep in sweeps.items():
        low, high, at_edge = span(sweep)
        width[name], tried = high / low, ", ".join(f"{lam:g}" for lam in sweep["lam"])
        edges.append(at_edge)
        said += f"{name}: near its best with lambda from {low:g} to {high:g}{', its best at an edge' * at_edge}, "
        said += "of {}, and in {near_best} of {trials} tuning trials; ".format(tried, **tuned.loc[name])
    before, least = study.runs["test"]["sft"]["correct_within"].mean(), (1 - near) * sweeps[SUBJECT]["mean"].max()
    decided = pd.concat(sweeps)["seeds"].min() >= FEW and before < least and not any(edges)
    verdict = OPEN if not decided else YES if width[SUBJECT] < width[SOFT] else NO
    return verdict, {"ranges": said, "least": 100 * least, "before": 100 * before}


_JUDGES = (over_soft, win_rate, at_similar_csr, competitive, same_student, no_overhead, guaranteed, degrades, narrow)
JUDGES = {judge.__name__: judge for judge in _JUDGES}


def effort(trials: pd.DataFrame, method: str) -> str:
    """How many trials a method was tuned by, and which of the best's settings are at the edge of those tried."""
    own = trials[trials["method"] == method]
    best = own.loc[own["accuracy_within"].idxmax()]
    edges = [name for name in ("lam", "learning_rate") if best[name] in (own[name].min(), own[name].max())]
    return f"{method} the best of {len(own)} trials" + (f" (at an edge in {' and '.join(edges)})" if edges else "")


def conditions(study: Study) -> dict[str, str]:
    """What fills the braces in the claims' conditions and evidence, beside what each judge found."""
    seeds, given = pd.concat(study.sweeps)["seeds"], study.settings
    at = f"arithmetic, budget {study.budget:g} nats, {study.runs['test'][SUBJECT]['seed'].nunique()} seeds"
    shares = {name: f"{100 * value:g}" for name, value in (given | {"near": 1 - given["near"]}).items()}
    tuned = f"{at}; {effort(study.trials, SUBJECT)}, {effort(study.trials, SOFT)}"
    own = {"soft": study.soft, "variant": study.ours, "budget": f"{study.budget:g}", "at": at, "tuned": tuned}
    return shares | own | {"turns": study.benchmark["repeats"].iloc[0], "seeds": f"{seeds.min()} to {seeds.max()}"}


def judge(study: Study, claims: list[dict] = CLAIMS) -> pd.DataFrame:
    """The verdicts, a row each. Raises `ValueError` where a run they need is missing."""
    needed = dict.fromkeys([SUBJECT, study.ours, study.soft, *(run for c in claims for run in c.get("baselines", []))])
    if missing := [name for name in needed if name not in set(study.completions["run"])]:
        raise ValueError(f"The verdicts need the runs {missing}: run the study first (`make study`).")
    said, found = conditions(study), []
    for claim in claims:
        verdict, values = JUDGES[claim["judge"]](study, claim) if "judge" in claim else (UNTESTED, {})
        words = {name: claim[name].format_map(said | values) for name in ("evidence", "conditions")}
        found.append({**{name: claim[name] for name in ("id", "claim", "published")}, "verdict": verdict, **words})
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
