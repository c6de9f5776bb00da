"""A verdict for each of the paper's claims (method, section 9), computed from the tables of the study.

The subject is `cmdp`, the paper's method as we read it. Differences are paired over seeds and prompts; the level of 5 %
is shared over as many comparisons as there are verdicts (Bonferroni). A claim of a gain is

- replicated, where its interval lies above nothing, though perhaps below what was published;
- not replicated, where its interval does not, and leaves out the published gain;
- inconclusive otherwise.

A bootstrap over five seeds is narrow: read a verdict that hangs on a bound's last point as inconclusive.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cmdp.statistics import MANY_RESAMPLES, bootstrap, bounds, cells, interval, with_budget
from cmdp.tasks import load_task
from replication.tables import difference, ranges, wins

YES, NO, OPEN, UNTESTED = "replicated", "not replicated", "inconclusive", "not tested at this scale"
WEAKEST_FIRST = (NO, OPEN, YES)
FEW = 3  # seeds: a comparison of single runs decides nothing
SUBJECT = "cmdp"
BASELINES = ("grpo", "gkd", "gkd-grpo-weak", "gkd-grpo-medium", "gkd-grpo-strong", "dual", "minillm", "kdrl")


class Claim(NamedTuple):
    """A row of the claims table."""

    id: str
    claim: str
    published: str
    verdict: str
    evidence: str
    conditions: str


def gain(low: float, high: float, published: float, none: float = 0.0) -> str:
    """The verdict on a claimed gain of `published`, where `none` is no gain."""
    if low > none:
        return YES
    return NO if high < published else OPEN


def span(sweep: pd.DataFrame) -> tuple[float, float, bool]:
    """(low, high, at_edge): the strengths around a method's best that are near it without a gap, and whether the best
    is the least or the greatest tried, so that the range may go on.

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


def effort(trials: pd.DataFrame, method: str) -> str:
    """How many trials a method was tuned by, variants included, and what of the best is at the edge of those tried."""
    own = trials[trials["run"].str.fullmatch(f"{method}(-weak|-medium|-strong)?")]
    best = own.loc[own["accuracy_within"].idxmax()]
    edges = [name for name in ("lam", "learning_rate") if best[name] in (own[name].min(), own[name].max())]
    return f"{method} the best of {len(own)} trials" + (f" (at an edge in {' and '.join(edges)})" if edges else "")


def claims(
    completions: pd.DataFrame,
    times: pd.DataFrame,
    strengths: pd.DataFrame,
    trials: pd.DataFrame,
    benchmark: pd.DataFrame,
    theory: dict,
    steps: np.ndarray,
    soft: str,
    ours: str,
    budget: float,
    settings: dict,
) -> pd.DataFrame:
    """The verdicts, a row each.

    Args:
        completions: of all arms, as `arms.read` gives them.
        times: a row an arm and seed, with the `parameters` of its student.
        strengths: `tables.strength`.
        trials: of tuning, with `chosen`.
        benchmark: steps of the methods that took turns, as `cmdp benchmark` writes them.
        theory: results of the theory study's summary.
        steps: of each held-out problem, by its index.
        soft: the soft Lagrangian that did best on validation prompts.
        ours: the constrained variant of ours that did.
        budget: the default, in nats.
        settings: `comparisons`, `tolerance`, `alike`, `target`, `near`.

    Raises:
        ValueError: an arm that a verdict needs is missing.
    """
    level = 1 - 0.05 / settings["comparisons"]
    tests = with_budget(completions[completions["split"] == "test"], budget)
    longer = with_budget(completions[completions["split"] == "longer"], budget)
    by_arm = dict(list(tests.groupby("arm")))
    needed = [SUBJECT, ours, soft, *BASELINES]
    if missing := [name for name in needed if name not in by_arm]:
        raise ValueError(f"The verdicts need the arms {missing}: run the study first (`make study`).")

    def minus(arm: str, rival: str, column: str) -> tuple[float, float, float]:
        return difference(by_arm[arm], by_arm[rival], column, level, MANY_RESAMPLES)[:3]

    def points(value: tuple[float, float, float]) -> str:
        return f"{100 * value[0]:+.1f} points [{100 * value[1]:+.1f}, {100 * value[2]:+.1f}]"

    def share(value: tuple[float, float, float]) -> str:
        return f"{100 * value[0]:.1f} % [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"

    at = f"arithmetic, budget {budget:g} nats, {by_arm[SUBJECT]['seed'].nunique()} seeds"
    tuned = f"{at}; {effort(trials, SUBJECT)}, {effort(trials, 'gkd-grpo')}"
    rows = []

    csr = minus(SUBJECT, soft, "satisfied")
    other = points(minus(ours, soft, "satisfied"))
    rows.append(
        Claim(
            "C1",
            "higher CSR than soft Lagrangian baselines",
            "+12.3 points",
            gain(*csr[1:], 0.123),
            f"{points(csr)} against {soft}; {ours} (ours): {other}",
            tuned,
        )
    )
    valid = minus(SUBJECT, soft, "valid")
    other = points(minus(ours, soft, "valid"))
    rows.append(
        Claim(
            "C2",
            "better reasoning than they",
            "+4.7 points reasoning accuracy",
            gain(*valid[1:], 0.047),
            f"every step right: {points(valid)} against {soft}; {ours} (ours): {other}",
            f"{tuned}; steps checked by program",
        )
    )
    rates = wins(completions, ["grpo", "gkd"], [SUBJECT, ours], level, MANY_RESAMPLES)
    ones = rates[rates["arm"] == SUBJECT].set_index("rival")
    verdicts = {gain(row.low, row.high, 0.55, none=0.5) for row in ones.itertuples()}
    said = [
        f"{row.arm} {'(ours) ' if row.arm == ours else ''}over {row.rival}: {share((row.win_rate, row.low, row.high))}"
        for row in rates.itertuples()
    ]
    rows.append(
        Claim(
            "C3",
            "reasoning win rate over GRPO and GKD",
            "+10 to 15 points",
            min(verdicts, key=WEAKEST_FIRST.index),
            "; ".join(said),
            f"{at}; judged by program, ties count half; +10 points over the rival are a win rate of 55 %",
        )
    )
    rows.append(
        Claim(
            "C4",
            "CSR on GSM8K, at a KL",
            "96.2 % at 0.15",
            UNTESTED,
            "needs the paper's models and a GPU",
            "profiles/colab.yaml, profiles/consumer-gpu.yaml",
        )
    )
    adherence, right = minus(SUBJECT, "minillm", "satisfied"), minus(SUBJECT, "minillm", "correct")
    alike = abs(adherence[0]) <= settings["alike"]
    if alike:
        verdict = gain(*right[1:], 0.05)
    else:  # ahead in both, or behind in both, says it, too
        verdict = YES if min(right[1], adherence[1]) > 0 else NO if max(right[2], adherence[2]) < 0 else OPEN
    rows.append(
        Claim(
            "C5",
            "against MiniLLM at similar constraint adherence",
            "+5 points on MATH",
            verdict,
            f"right answers {points(right)}, CSR {points(adherence)}"
            + ("" if alike else ": the adherence is not similar"),
            f"{at}; arithmetic in place of MATH (profiles/paper.yaml)",
        )
    )
    baselines = trials[(trials["chosen"] == 1) & trials["run"].isin(BASELINES)]
    best = baselines.loc[baselines["accuracy"].idxmax(), "run"]  # on validation prompts
    library = f"; against trl-gkd: {points(minus(SUBJECT, 'trl-gkd', 'correct'))}" if "trl-gkd" in by_arm else ""
    loss = minus(SUBJECT, best, "correct")
    tolerance = settings["tolerance"]
    rows.append(
        Claim(
            "C6",
            "competitive task performance",
            "-",
            YES if loss[1] > -tolerance else NO if loss[2] < -tolerance else OPEN,
            f"right answers {points(loss)} against the best baseline on validation prompts, {best}{library};"
            f" {ours} (ours): {points(minus(ours, best, 'correct'))}",
            f"{tuned}; within {100 * tolerance:g} points is competitive",
        )
    )
    sizes = times[times["arm"].isin(["sft", SUBJECT])].groupby("arm")["parameters"].unique()
    same = len(sizes) == 2 and set(sizes[SUBJECT]) == set(sizes["sft"])
    rows.append(
        Claim(
            "C7",
            "no teacher and no augmented state at deployment",
            "-",
            YES if same else NO,
            f"the distilled student has {'the' if same else 'not the'} parameters of the one before, "
            f"{sizes[SUBJECT][0]:,}, and is measured on prompts alone",
            "so by construction; tests/test_export.py generates without teacher and without this package",
        )
    )
    ratios = benchmark.set_index("trainer").loc[[f"cmdp / {name}" for name in ("gkd-grpo", "dual")]]
    low, high = ratios["low"].min(), ratios["high"].max()
    shown = [f"{row.median:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in ratios.itertuples()]
    rows.append(
        Claim(
            "C8",
            "no overhead of dual optimisation",
            "-",
            YES if high <= 1.05 else NO if low > 1.05 else OPEN,
            f"a step takes {shown[0]} of the soft Lagrangian's, {shown[1]} of dual ascent's",
            f"`make benchmark`, {ratios['repeats'].iloc[0]} turns; median and its 95 % interval; up to 5 % is none",
        )
    )
    bound = max(found["greatest_p_over_bound"] for found in theory["penalty_bound"].values())
    satisfied, target = cells(by_arm[SUBJECT], "satisfied"), settings["target"]
    kept = interval(satisfied, level=level, resamples=MANY_RESAMPLES)
    rows.append(
        Claim(
            "C9",
            "constraint satisfaction is guaranteed",
            "-",
            NO if bound > 1 or kept[2] < target else YES if kept[1] >= target else OPEN,
            f"exact maximisers on token trees {'keep' if bound <= 1 else 'break'} the bound on violations (at most "
            f"{bound:.2f} of it is used); "
            f"a trained student keeps {share(kept)} of its trajectories within the budget",
            f"{at}; guaranteed is {100 * target:g} % at least",
        )
    )
    fewest, most = steps.min(), steps.max()
    losses, draws = {}, {}
    for name in (SUBJECT, soft):
        table = by_arm[name].assign(steps=steps[by_arm[name]["prompt"]])
        easy, hard = (cells(table[table["steps"] == count], "correct") for count in (fewest, most))
        # the same seeds, other prompts
        draws[name] = 1 - bootstrap(hard, resamples=MANY_RESAMPLES) / bootstrap(easy, resamples=MANY_RESAMPLES)
        losses[name] = (1 - hard.mean() / easy.mean(), *bounds(draws[name], level))
    further = (losses[SUBJECT][0] - losses[soft][0], *bounds(draws[SUBJECT] - draws[soft], level))
    longest = {
        name: interval(cells(longer[longer["arm"] == name], "correct"), level=level, resamples=MANY_RESAMPLES)
        for name in (SUBJECT, soft, "teacher")
        if name in by_arm
    }
    rows.append(
        Claim(
            "L1",
            "degrades on complex multi-step problems",
            "-",
            YES if further[1] > 0 else NO if further[2] < tolerance else OPEN,
            f"of its right answers {SUBJECT} loses {share(losses[SUBJECT])} from {fewest} to {most} steps, {soft} "
            f"{share(losses[soft])}: difference {points(further)}; of problems longer than any in training "
            + ", ".join(f"{name} solves {share(value)}" for name, value in longest.items()),
            f"{at}; replicated if it loses a larger part than {soft}",
        )
    )
    within = strengths[strengths["measure"] == "accuracy_within"]
    sweeps = {name: within[within["method"] == name].sort_values("lam") for name in (SUBJECT, "gkd-grpo")}
    spans = {name: span(sweep) for name, sweep in sweeps.items()}
    seeds = pd.concat(sweeps)["seeds"]
    before, least = by_arm["sft"]["correct_within"].mean(), (1 - settings["near"]) * sweeps[SUBJECT]["mean"].max()
    decided = seeds.min() >= FEW and before < least and not any(at_edge for *_, at_edge in spans.values())
    width = {name: high / low for name, (low, high, _) in spans.items()}
    near = ranges(trials, settings["near"]).drop_duplicates("method").set_index("method")
    rows.append(
        Claim(
            "L2",
            "needs careful tuning of its parameters",
            "-",
            OPEN if not decided else YES if width[SUBJECT] < width["gkd-grpo"] else NO,
            "; ".join(
                f"{name}: near its best with lambda from {low:g} to {high:g}{', its best at an edge' * at_edge}, of "
                f"{', '.join(f'{lam:g}' for lam in sweeps[name]['lam'])}, and in {near.loc[name, 'near_best']} of "
                f"{near.loc[name, 'trials']} tuning trials"
                for name, (low, high, at_edge) in spans.items()
            )
            + f"; near is {100 * least:.1f} % for {SUBJECT}, and the student has {100 * before:.1f} % before training",
            f"arithmetic, budget {budget:g} nats, {seeds.min()} to {seeds.max()} seeds a lambda; near: at least "
            f"{100 * (1 - settings['near']):g} % of the method's best, right and within it",
        )
    )
    return pd.DataFrame(rows)


def judge(completions: pd.DataFrame, results: Path, params: dict, settings: dict) -> pd.DataFrame:
    """The verdicts, from all completions and the study's tables under `results`.

    Args:
        completions: of all arms, as `arms.read` gives them.
        params: of the default experiment, with what tuning found best.
        settings: of the verdicts, from study/params.yaml.
    """
    theory = json.loads((results / "theory" / "summary.json").read_text(encoding="utf-8"))["results"]
    names = ("study/times", "study/strength", "tuning", "benchmark/default")
    tables = [pd.read_csv(results / f"{name}.csv") for name in names]
    soft, ours, budget = params["best"]["soft"], params["best"]["ours"], params["budget"]["budget"]
    return claims(completions, *tables, theory, problem_steps(params), soft, ours, budget, settings)


def problem_steps(params: dict) -> np.ndarray:
    """How many steps each problem of the held-out split takes: drawn again, since results files hold no problems."""
    task = params["task"]
    splits = load_task(task["name"]).problems(task["sizes"], tuple(task["steps"]), task["seed"])
    return np.array([problem["solution"].count(" ; ") for problem in splits[params["evaluate"]["split"]]])
