"""Exact study of the method on token trees (method, sections 2 to 7); run it with `python -m replication theory`.

`trees` holds the trees and exact values; `optimum`, `guarantees` and `contest` (the policy gradients of `learners`
against the exact optimum) compute tables, which `run` writes; `plots` and `tables` read the files, without torch.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cmdp.storage import read_yaml, whole, write_json, write_table
from replication.experiments import RESULTS

LEARNERS = {  # form of the modified reward and name of the tuned parameter; None: without
    "grpo": (None, None),
    "gkd": (None, None),
    "minillm": (None, None),
    "gkd-grpo": ("lagrangian", "lambda"),
    "dual": ("lagrangian", "step"),
    "kdrl": (None, "beta"),
    "saute-constant": ("exhausted", "n"),
    "saute-augmented": ("exhausted", "n"),
    "cmdp": ("exhausted", "lambda"),
    "cmdp-overshoot": ("overshoot", "lambda"),
    "cmdp-hinge": ("hinge", "lambda"),
    "worst-case": ("overshoot", "lambda"),  # on the excess of each step, with budget 0
}
# a margin, for any form: aim at less than d, so that a learner that ends beside its aim is still within d
LEARNERS |= {f"{name}-margin": LEARNERS[name] for name in ("cmdp", "cmdp-overshoot", "cmdp-hinge")}
OURS = ("cmdp-margin", "cmdp-overshoot", "cmdp-overshoot-margin", "cmdp-hinge", "cmdp-hinge-margin")
FORMS = ("exhausted", "overshoot", "hinge")  # of the modified reward, those that depend on the budget
Found = Iterator[tuple[str, pd.DataFrame]]  # the name of a table and some of its rows


def run(parameters: dict, folder: Path) -> None:
    """Write every table into `folder`. The same parameters (params.yaml) give the same bytes."""
    from replication.theory import contest, guarantees, optimum

    studies = optimum.optimum, optimum.refinement, optimum.example, guarantees.penalty_bound
    studies += guarantees.augmentation, guarantees.exact_penalty, guarantees.gradient, guarantees.jump, contest.contest
    found = [part for study in studies for part in study(parameters)]
    for name in dict(found):
        write_table(pd.concat([table for other, table in found if other == name]), folder / f"{name}.csv")
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    against = contest.against_optimum(tables["optimum"], tables["learners"], parameters["seed"])
    write_table(against, folder / "against_optimum.csv")
    write_json({"parameters": parameters, "results": summarise(tables)}, folder / "summary.json")


def summarise(tables: dict[str, pd.DataFrame]) -> dict:
    """The numbers that the notebook quotes, from the tables of the result files."""
    optimum, bound, prices = (tables[name] for name in ("optimum", "penalty_bound", "exact_penalty"))
    gain = (optimum["lower"] - optimum["soft_never"]).groupby(optimum["budget"])
    ratio, positive = bound["p"] / bound["bound"].clip(lower=1e-12), bound["p"].where(bound["n"] > 0)
    bound = pd.DataFrame({"greatest_p_over_bound": ratio, "greatest_p_at_positive_n": positive}).groupby(bound["case"])
    smooth = tables["gradient"].query("not crossing")
    error = smooth["error"].abs() / smooth["difference"].abs().clip(lower=1e-3)
    jumps = tables["jump_crossings"].groupby("form")[["jump", "error"]].agg(lambda values: values.abs().max())
    quantiles = prices[["threshold", "greatest_price", "root_price"]].quantile([0.1, 0.5, 0.9, 1.0])
    resolved = prices[prices["resolved"]]
    ranks = resolved["threshold"].corr(resolved["greatest_price"], "spearman")
    shares = {"rank_correlation_where_resolved": ranks, "resolved": prices["resolved"].mean()}
    return {
        "optimum": {
            "relative_gap_of_bracket": 1 - optimum["lower"].sum() / optimum["upper"].sum(),
            "policy_error": optimum["policy_error"].abs().max(),
            "greatest_violation": float(optimum["policy_violation"].max()),
            "mean": optimum["lower"].mean(),
            "teacher": optimum["teacher"].mean(),
            "best_soft_never": optimum["soft_never"].mean(),
            "gain_over_best_soft_never": {str(d): part.quantile([0.1, 0.5, 0.9]).tolist() for d, part in gain},
        },
        "penalty_bound": bound.max().to_dict("index"),
        "augmentation": {"greatest_difference": tables["augmentation"].eval("does_not - sees_z").abs().max()},
        "gradient": {"greatest_relative_error": error.groupby(smooth["form"], sort=False).max().to_dict()},
        "jump": jumps.set_axis(["greatest", "greatest_error"], axis=1).to_dict("index"),
        "mean_is_not_enough": optimum["soft_on_average_violation"].agg(["min", "median", "mean", "max"]).to_dict(),
        "exact_penalty": quantiles.to_dict("list") | shares,
    }


def write() -> None:
    """Run the study with the settings of params.yaml beside this file, on one thread: results/theory."""
    import torch

    torch.set_num_threads(1)
    with whole(RESULTS / "theory") as folder:
        run(read_yaml(Path(__file__).with_name("params.yaml")), folder)
