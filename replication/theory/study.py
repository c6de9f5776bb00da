"""The theory study: what of section 4 holds, the exact optimum, and every learner against it (method, sections 2 to 7).

`run(parameters, folder)` writes small result files; `replication.theory.plots` and `replication.theory.tables` read them, and
`notebooks/01_theory.ipynb` tells the story. The same parameters give the same bytes, but for `timing.csv`.
"""

from pathlib import Path

import pandas as pd

from cmdp.storage import write_json, write_table
from replication.theory import FORMS
from replication.theory.contest import against_optimum, contest
from replication.theory.crossings import gradient, jump
from replication.theory.guarantees import augmentation, exact_penalty, penalty_bound
from replication.theory.optimum import example, optimum, refinement, timing

STUDIES = (optimum, refinement, timing, example, penalty_bound, augmentation, exact_penalty, gradient, jump, contest)


def run(parameters: dict, folder: Path) -> None:
    """Every study in turn, into `folder`: tables, then what is said of them."""
    for study in STUDIES:
        for name, table in study(parameters).items():
            write_table(table, folder / f"{name}.csv")
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    write_table(
        against_optimum(tables["optimum"], tables["learners"], parameters["seed"]), folder / "against_optimum.csv"
    )
    write_json({"parameters": parameters, "results": summarise(tables)}, folder / "summary.json")


def summarise(tables: dict[str, pd.DataFrame]) -> dict:
    """The numbers that the notebook quotes, from the tables of the result files."""
    optimum, bound, jumps = (tables[name] for name in ("optimum", "penalty_bound", "jump_crossings"))
    augmented, thresholds = tables["augmentation"], tables["exact_penalty"]
    smooth = tables["gradient"][~tables["gradient"]["crossing"]]
    error = smooth["error"].abs() / smooth["difference"].abs().clip(lower=1e-3)
    resolved = thresholds[thresholds["resolved"]]
    shares = optimum["soft_on_average_violation"]
    gain = (optimum["lower"] - optimum["soft_never"]).groupby(optimum["budget"])
    return {
        "optimum": {
            "relative_gap_of_bracket": float(1 - optimum["lower"].sum() / optimum["upper"].sum()),
            "policy_error": float(optimum["policy_error"].abs().max()),
            "greatest_violation": float(optimum["policy_violation"].max()),
            "mean": float(optimum["lower"].mean()),
            "teacher": float(optimum["teacher"].mean()),
            "best_soft_never": float(optimum["soft_never"].mean()),
            "gain_over_best_soft_never": {str(budget): quantiles(part, 0.1, 0.5, 0.9) for budget, part in gain},
        },
        "penalty_bound": {
            case: {
                "greatest_p_over_bound": float((part["p"] / part["bound"].clip(lower=1e-12)).max()),
                "greatest_p_at_positive_n": float(part.loc[part["n"] > 0, "p"].max()),
            }
            for case, part in bound.groupby("case")
        },
        "augmentation": {"greatest_difference": float((augmented["does_not"] - augmented["sees_z"]).abs().max())},
        "gradient": {"greatest_relative_error": {form: float(error[smooth["form"] == form].max()) for form in FORMS}},
        "jump": {
            form: {"greatest": float(part["jump"].abs().max()), "greatest_error": float(part["error"].abs().max())}
            for form, part in jumps.groupby("form")
        },
        "mean_is_not_enough": {name: float(shares.agg(name)) for name in ("min", "median", "mean", "max")},
        "exact_penalty": {
            name: quantiles(thresholds[name], 0.1, 0.5, 0.9, 1.0)
            for name in ("threshold", "greatest_price", "root_price")
        }
        | {
            "rank_correlation_where_resolved": float(
                resolved["threshold"].corr(resolved["greatest_price"], method="spearman")
            ),
            "resolved": float(thresholds["resolved"].mean()),
        },
    }


def quantiles(values: pd.Series, *levels: float) -> list[float]:
    return values.quantile(list(levels)).tolist()
