"""Tables of the theory study as its notebook shows them, each from the result files in `results`."""

import json
from pathlib import Path

import pandas as pd

from replication.tables import percent
from replication.theory import OURS


def summary(results: Path, part: str) -> dict:
    """One part of the numbers in summary.json."""
    return json.loads((results / "summary.json").read_text(encoding="utf-8"))["results"][part]


def numbers(results: Path, part: str) -> pd.DataFrame:
    """One part of the summary: a row per case, or one row of its single numbers."""
    found = summary(results, part)
    if not all(isinstance(x, dict) for x in found.values()):
        found = {part: {name: x for name, x in found.items() if isinstance(x, float)}}
    table = pd.DataFrame.from_dict(found, orient="index").map("{:.3g}".format)
    return table.rename(index=lambda name: name.replace("_", " "), columns=lambda name: name.replace("_", " "))


def bracket(results: Path) -> pd.DataFrame:
    """Both ends of the bracket of V(s_0, d), mean over trees, by levels of the grid."""
    table = pd.read_csv(results / "refinement.csv").groupby(["budget", "levels"])[["lower", "upper"]].mean()
    return table.unstack("budget").swaplevel(axis=1).sort_index(axis=1).round(4)


def augmentation(results: Path) -> pd.DataFrame:
    """The optimum of students that see z and of those that do not, tree by tree."""
    names = {"sees_z": "sees z (DP, lower)", "sees_z_upper": "sees z (DP, upper)", "does_not": "does not see z (NLP)"}
    return pd.read_csv(results / "augmentation.csv").rename(columns=names).set_index("tree").round(4)


def gain_over_soft(results: Path) -> pd.DataFrame:
    """Reward of the budgeted optimum minus that of the best soft optimum that never violates: quantiles over trees."""
    table = pd.DataFrame(summary(results, "optimum")["gain_over_best_soft_never"], index=["10 %", "median", "90 %"]).T
    return (100 * table).round(1).rename_axis(index="budget d", columns="gain (points of reward)")


def prices(results: Path) -> pd.DataFrame:
    """The lambda from which the hinge's maximiser is feasible, and the prices that predict it: quantiles over trees."""
    names = {"threshold": "least sufficient λ", "greatest_price": "greatest price", "root_price": "price at the root"}
    table = pd.DataFrame(summary(results, "exact_penalty") | {"quantile": ["10 %", "median", "90 %", "greatest"]})
    return table.set_index("quantile")[[*names]].rename(columns=names).round(2)


def sampled_learners(results: Path) -> pd.DataFrame:
    """Over all budgets, the learners that sample and the soft Lagrangian's optima, by reward: a row per method."""
    table = pd.read_csv(results / "against_optimum.csv")
    table = table[(table["budget"] == "all") & table["variant"].isin(["sampled", "closed form"])]
    return table.sort_values("of_optimum", ascending=False).set_index("method")


def learners(results: Path) -> pd.DataFrame:
    """Reward relative to the optimum and CSR; for cmdp, our forms and worst-case also the paired gain over gkd-grpo."""
    table = sampled_learners(results)
    compared = table[table.index.isin(["cmdp", "worst-case", *OURS])]
    columns = {"reward / optimum (%)": percent(table, "of_optimum", "of_optimum_")}
    columns["CSR (%)"] = percent(table, "csr", "csr_")
    columns["gain in reward / optimum (points)"] = percent(compared, "of_optimum_gain", "of_optimum_gain_")
    columns["gain in CSR (points)"] = percent(compared, "csr_gain", "csr_gain_")
    return pd.DataFrame(columns).loc[table.index].fillna("")


def first_cost(results: Path) -> pd.DataFrame:
    """The first token's cost relative to its cost in the optimum, by budget; exact gradient."""
    judged, optimum = (pd.read_csv(results / f"{name}.csv") for name in ("learners", "optimum"))
    spent = judged[judged["variant"] == "exact gradient"].groupby(["method", "budget"])["first"].mean().unstack()
    methods = ["cmdp", "cmdp-margin", "cmdp-overshoot-margin", "cmdp-hinge-margin", "worst-case"]
    relative = spent.loc[methods] / optimum.groupby("budget")["first"].mean()
    return relative.rename_axis(columns="first token's cost over the optimum's, at d =").round(2)
