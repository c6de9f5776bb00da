"""Figures of the study, each drawn from the tables under results/study alone: SVG and PNG.

A method has one colour and one marker throughout, those of the default experiment's figures. An arm that was not run is
left out. Bars are 95 % intervals; those of differences are for all arms of a figure at once.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from cmdp.storage import whole
from replication.plots import FAMILIES, MARKERS, family, save, style

TARGET = 0.95  # of the CSR
SOFT = "gkd-grpo"
MEASURES = {
    "accuracy": "right answers",
    "csr": "within the budget",
    "accuracy_within": "right and within",
    "validity": "every step right",
}
CAPACITIES = {"student-tenth": 0.1, "student": 0.3, "student-half": 0.5, "student-equal": 1.0}  # of the teacher's
ABLATIONS = {  # what an arm changes in the method that it is an ablation of
    "saute-constant": "no Φ: a constant penalty",
    "cmdp-penalty": "a constant penalty beside Φ",
    "cmdp-discount": "discounted cost",
    "cmdp-per-token": "budget per token",
    "cmdp-k3": "cost: k3 estimates",
    "cmdp-forward-kl": "cost: forward KL",
    "cmdp-jsd": "cost: Jensen-Shannon",
    "cmdp-return-to-go": "credit: return to go",
    "cmdp-single-step": "single-step part alone",
    "gkd-grpo-both-parts": "long-term part too",
    "cmdp-gkd-first": "pure distillation first",
    "cmdp-schedule": "budget lowered in training",
    "gkd-few-prompts": "8 completions a prompt",
    "grpo-few-prompts": "8 completions a prompt",
    "cmdp-few-prompts": "8 completions a prompt",
}
TRACED = ("sft", "grpo", "gkd", "cmdp", "cmdp-hinge", "cmdp-adaptive")  # and the best soft Lagrangian: all are too many
FEW = 30  # completions: a share of fewer is not drawn
GREY = "0.35"


def draw_all(results: Path, folder: Path) -> None:
    """Draw every figure into `folder`, which is replaced as a whole.

    Raises:
        FileNotFoundError: a table is not among the `results`.
    """
    for table in ("ablations", "frontier", "paired", "strength", "summary", "violation"):
        _read(results, table)  # before any is drawn
    with whole(folder) as unfinished:
        for draw in (frontier, paired, sensitivity, ablations, capacity, violation, drift):
            with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
                figure = draw(results)
            save(figure, unfinished, draw.__name__)


def frontier(results: Path) -> plt.Figure:
    """Accuracy against CSR, a panel a budget: the soft Lagrangians joined, what was trained for the budget ringed."""
    table = _read(results, "frontier")
    budgets = sorted(table["budget"].unique())
    columns = 3 if len(budgets) == 3 else 2
    rows = -(-len(budgets) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(8.4, 2.7 * rows + 1.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, budget in zip(grid.flat, budgets, strict=False):
        part = table[table["budget"] == budget].set_index("method")
        soft = [run for run in _ordered(part.index) if family(run) == SOFT]
        axes.plot(part.loc[soft, "csr"], part.loc[soft, "accuracy"], color=style(SOFT)[0], linewidth=1.4, zorder=2)
        for run in _ordered(part.index):
            row = part.loc[run]
            aware = not np.isnan(row["trained_at"])
            _point(
                axes,
                run,
                *(row[name] for name in ("csr", "accuracy")),
                xerr=_reach(*row[["csr", "csr_low", "csr_high"]]),
                yerr=_reach(*row[["accuracy", "accuracy_low", "accuracy_high"]]),
                **({"markeredgecolor": "black", "markeredgewidth": 1.2, "zorder": 4} if aware else {"zorder": 3}),
            )
        axes.axvline(TARGET, color="black", linestyle="--", linewidth=1, zorder=1)
        axes.set_title(f"budget: {budget:g} {'nat' if budget == 1 else 'nats'}", loc="left", fontsize="medium")
        axes.set_xlabel(MEASURES["csr"])
        _percent(axes.xaxis, axes.yaxis)
    for axes in list(grid.flat)[len(budgets) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(MEASURES["accuracy"])
    _titles(figure, "Does a budget buy satisfaction, and at what price in right answers?")
    rim = plt.Line2D([], [], marker="o", linestyle="", color="white", markeredgecolor="black", markeredgewidth=1.2)
    dashes = plt.Line2D([], [], color="black", linestyle="--", linewidth=1)
    _legend(figure, grid, ([rim, dashes], ["trained for it", f"{TARGET:.0%} within"]))
    return figure


def paired(results: Path) -> plt.Figure:
    """Every arm's difference to the soft Lagrangian, paired over seeds and prompts, a panel a measure."""
    table = _read(results, "paired")
    rival = _best_soft(table)
    table = table[table["rival"] == rival]
    rows = _ordered(table["arm"].unique())
    figure = _forest(table, rows, rows, list(MEASURES))
    _titles(figure, f"Who beats the best soft Lagrangian, {rival}?", f"points more than {rival} (right of 0 is better)")
    return figure


def sensitivity(results: Path) -> plt.Figure:
    """What each method makes of its lambda: right and within against it, the range that is near the best shaded."""
    table = _read(results, "strength")
    strengths = table.groupby("method")["lam"].nunique()
    methods = _ordered(strengths[strengths > 1].index)  # one strength has no range
    figure, grid = plt.subplots(
        1, max(1, len(methods)), figsize=(8.4, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    lines = {"accuracy": (":", MEASURES["accuracy"]), "csr": ("--", MEASURES["csr"])}
    for axes, method in zip(grid[0], methods, strict=False):
        colour, marker = style(method)
        part = table[table["method"] == method].sort_values("lam")
        within = part[part["measure"] == "accuracy_within"]
        for low, high in _near_best(within["lam"].to_numpy(), within["near_best"].to_numpy() == 1):
            axes.axvspan(low, high, color=colour, alpha=0.15, linewidth=0, zorder=0)
        for measure, (dash, label) in lines.items():
            rows = part[part["measure"] == measure]
            axes.plot(rows["lam"], rows["mean"], linestyle=dash, color=GREY, linewidth=1.2, label=label)
        axes.errorbar(
            within["lam"],
            within["mean"],
            yerr=_reach(within["mean"], within["low"], within["high"]),
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor="white",
            elinewidth=1,
            linewidth=1.8,
        )
        axes.set(xscale="log", xlabel="λ")
        axes.set_title(method, loc="left", fontsize="medium")
        _percent(axes.yaxis)
    colours = plt.Line2D([], [], color="black", marker="o", linewidth=1.8, markeredgecolor="white")
    shade = plt.Rectangle((0, 0), 1, 1, color="0.85")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    _titles(figure, "Over what range does λ work?")
    figure.legend(
        [colours, *handles, shade],
        [MEASURES["accuracy_within"], *labels, "within 5 % of the method's best"],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def ablations(results: Path) -> plt.Figure:
    """Each ablation's difference to the method that it changes, below that method, paired over seeds and prompts."""
    table = _read(results, "ablations")
    methods = _ordered(table["rival"].unique())
    rows = [arm for method in methods for arm in (method, *table.loc[table["rival"] == method, "arm"].unique())]
    labels = [row if row in methods else ABLATIONS.get(row, row) for row in rows]
    figure = _forest(table, rows, labels, ["csr", "accuracy_within"])
    for axes in figure.axes:
        for method in methods:
            _point(axes, method, 0, rows.index(method), markeredgecolor="black")
    for label in figure.axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in methods else "normal")
    _titles(figure, "Which part of the method matters?", "points more than the method, in bold, that is changed")
    return figure


def capacity(results: Path) -> plt.Figure:
    """Accuracy and CSR of students that are a tenth, three tenths, a half and the whole of the teacher."""
    table = _read(results, "summary")
    runs = _ordered(table.loc[table["family"] == "capacity", "run"].unique())
    usual = (table["family"] == "method") & (table["start"] == "student")
    teacher = table[table["start"] == "teacher"].set_index("measure")
    table = table[table["run"].isin(runs) & (usual | (table["family"] == "capacity"))]
    table = table.assign(capacity=table["start"].map(CAPACITIES))
    panels = ("accuracy", "csr")
    figure, grid = plt.subplots(1, len(panels), figsize=(8.4, 3.4), layout="constrained")
    for axes, measure in zip(grid, panels, strict=True):
        for place, run in enumerate(runs):
            part = table[(table["run"] == run) & (table["measure"] == measure)].sort_values("capacity")
            at = part["capacity"] * 1.02 ** (place - (len(runs) - 1) / 2)  # side by side, not one upon another
            _point(axes, run, at, part["mean"], yerr=_reach(part["mean"], part["low"], part["high"]), linestyle="-")
        if measure == "accuracy" and measure in teacher.index:
            axes.axhline(teacher.loc[measure, "mean"], color="black", linestyle=":", label="the teacher")
        axes.set_xscale("log")
        axes.set_xticks(list(CAPACITIES.values()), [f"{share:g}" for share in CAPACITIES.values()])
        axes.minorticks_off()
        axes.set_title(MEASURES[measure], loc="left", fontsize="medium")
        _percent(axes.yaxis)
    _titles(
        figure, "Does a wider gap to the teacher change who wins?", "student's parameters, as a share of the teacher's"
    )
    _legend(figure, grid)
    return figure


def violation(results: Path) -> plt.Figure:
    """Accuracy, validity and confidence of completions by how much of the budget they spent, a line a method.

    A bin of fewer than `FEW` completions is left out.
    """
    table = _read(results, "violation")
    table = table[table["count"] >= FEW]
    traced = {*TRACED, _best_soft(_read(results, "paired"))}
    bins = table[["bin", "low"]].drop_duplicates().sort_values("low")
    place = {name: at for at, name in enumerate(bins["bin"])}
    panels = {"accuracy": "right answers", "validity": "every step right", "confidence": "confidence"}
    figure, grid = plt.subplots(1, len(panels), figsize=(8.4, 3.2), sharey=True, layout="constrained")
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        for method in _ordered(table["method"].unique()):
            part = table[table["method"] == method].sort_values("low")
            at = part["bin"].map(place)
            if method in traced:
                _point(axes, method, at, part[column], linestyle="-", markersize=6)
            else:
                axes.plot(at, part[column], color="0.75", linewidth=0.8, zorder=1)
        axes.axvline((bins["low"] < 1).sum() - 0.5, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(list(place.values()), list(place), rotation=45, ha="right", rotation_mode="anchor")
        axes.set_title(label, loc="left", fontsize="medium")
        _percent(axes.yaxis)
    _titles(
        figure,
        "What breaks when the budget is exceeded?",
        "what a completion spent, as a multiple of the budget; dashed: all of it",
    )
    _legend(figure, grid, ([plt.Line2D([], [], color="0.75", linewidth=0.8)], ["other methods"]))
    return figure


def drift(results: Path) -> plt.Figure:
    """What goes with the distance from the teacher: a point an arm, against its mean cost; methods large."""
    table = _read(results, "summary")
    table = table[table["start"].isin(["student", "teacher"])]
    arms = table.drop_duplicates("arm").set_index("arm")
    table = table.set_index(["arm", "measure"])
    panels = {
        "calibration_error": "calibration error (less is better)",
        "diversity": "variety of phrasing",
        "style_distance": "distance from the teacher's phrasings",
        "longer_accuracy": "right answers to longer problems",
    }
    figure, grid = plt.subplots(2, 2, figsize=(8.4, 6.2), sharex=True, layout="constrained")
    for axes, (measure, label) in zip(grid.flat, panels.items(), strict=True):
        for arm in _ordered(arms.index):
            if (arm, measure) not in table.index or (arm, "cost") not in table.index:
                continue
            cost, row = table.loc[(arm, "cost")], table.loc[(arm, measure)]
            method = arms.loc[arm, "family"] == "method"
            name = arm if method else arms.loc[arm, "run"]
            options = {"markersize": 4.5, "alpha": 0.45, "label": None}
            if method:
                options = {"yerr": _reach(row["mean"], row["low"], row["high"]), "zorder": 3}
            _point(axes, name, cost["mean"], row["mean"], **options)
        axes.set_title(label, loc="left", fontsize="medium")
        _percent(axes.yaxis)
    for axes in grid[-1]:
        axes.set_xlabel("mean cost (nats from the teacher)")
    _titles(figure, "What goes with drifting from the teacher? (Small: the methods at other settings)")
    _legend(figure, grid)
    return figure


def _read(results: Path, name: str) -> pd.DataFrame:
    path = results / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `make study` writes the study's tables.")
    return pd.read_csv(path)


def _best_soft(paired: pd.DataFrame) -> str:
    """The soft Lagrangian that the others are compared with: the one that validation prompts preferred."""
    return next((rival for rival in paired["rival"] if family(rival) == SOFT), SOFT)


def _ordered(runs: Iterable[str]) -> list[str]:
    """Runs or arms in the order of the methods, weaker variants first."""
    methods, variants = list(FAMILIES), list(MARKERS)

    def place(run: str) -> tuple:
        variant = run.rpartition("-")[2]
        return methods.index(family(run)), variants.index(variant) if variant in variants else -1

    return sorted(runs, key=place)


def _reach(mean, low, high) -> np.ndarray:
    """How far the interval reaches below and above the mean, as `errorbar` wants it: (2, n)."""
    return np.clip([mean - low, high - mean], 0, None).reshape(2, -1)


def _point(axes: plt.Axes, run: str, x, y, **options):
    """Points of a run in its colour and marker, with what bars there are."""
    colour, marker = style(run)
    usual = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6, "elinewidth": 0.9, "linestyle": ""}
    options = usual | {"label": run} | options
    if marker == "*" or isinstance(marker, tuple):  # stars have less ink
        options["markersize"] *= 1.6
    return axes.errorbar(x, y, color=colour, marker=marker, **options)


def _near_best(values: np.ndarray, near: np.ndarray) -> list[tuple[float, float]]:
    """Where to shade a log axis: each value that is near the best, up to half way to its neighbours."""
    if len(values) < 2:
        return []
    middle = np.sqrt(values[1:] * values[:-1])
    edges = [values[0] ** 2 / middle[0], *middle, values[-1] ** 2 / middle[-1]]
    return [(edges[at], edges[at + 1]) for at in np.flatnonzero(near)]


def _titles(figure: plt.Figure, question: str, below: str = "") -> None:
    """The question that a figure answers, above it; what its horizontal axes show, below."""
    figure.suptitle(question, x=0.01, ha="left", fontweight="bold", fontsize="medium")
    figure.supxlabel(below, fontsize="medium")
    figure.get_layout_engine().set(h_pad=0.07)


def _percent(*axes) -> None:
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _forest(table: pd.DataFrame, rows: list[str], labels: list[str], measures: list[str]) -> plt.Figure:
    """Paired differences in points, a row an arm from the top, a panel a measure. A row of no arm stays empty."""
    table = table.set_index(["arm", "measure"])
    size = (2.4 + 1.5 * len(measures), 0.28 * len(rows) + 1.3)
    figure, grid = plt.subplots(1, len(measures), figsize=size, sharey=True, layout="constrained")
    for axes, measure in zip(grid, measures, strict=True):
        for place, arm in enumerate(rows):
            if (arm, measure) in table.index:
                value = 100 * table.loc[(arm, measure), ["difference", "low", "high"]].astype(float)
                _point(axes, arm, value["difference"], place, xerr=_reach(*value), markersize=6.5)
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        axes.set_title(MEASURES[measure], loc="left", fontsize="medium")
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        axes.grid(axis="y", linewidth=0.4)
    grid[0].set_yticks(range(len(rows)), labels)
    grid[0].set_ylim(len(rows) - 0.3, -0.7)
    return figure


def _legend(figure: plt.Figure, grid: np.ndarray, extra: tuple[list, list] = ([], [])) -> None:
    """One legend for all panels, of every run that any of them shows: at the right, or below where it is long."""
    found = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = [*_ordered(found)]
    handles = [found[name] for name in names]
    place = {"loc": "outside right center"} if len(names) < 10 else {"loc": "outside lower center", "ncols": 5}
    figure.legend([*handles, *extra[0]], [*names, *extra[1]], frameon=False, **place)
