"""Figures of the default experiment and of the study, from results files alone: SVG and PNG, readable in print and by
the colour-blind.

A run has one colour and one marker throughout: those of its method, in shades where several runs share a method. A
method that knows the budget has dashed lines, so that curves that coincide stay visible. A run that is missing is left
out. Bars are 95 % intervals; those of differences hold for all runs of a figure at once.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from cmdp.storage import read_yaml, whole
from replication.experiments import EXPERIMENTS, FIGURES, PARAMS, RESULTS, Row, gather, rows
from replication.tables import BUDGET_FREE, by_name

PALETTE = sns.color_palette("colorblind")
STYLES = {  # colour and marker of each run of a method, in the order of experiments.yaml
    "sft": [(PALETTE[7], "s")],
    "grpo": [(PALETTE[1], "X"), ((0.52, 0.34, 0.01), "v")],
    "gkd": [(PALETTE[2], "P")],
    "gkd-grpo": [((0.4, 0.67, 0.82), "v"), (PALETTE[0], "o"), ((0.0, 0.27, 0.42), "^")],
    "cmdp": [(PALETTE[3], "D")],
    "cmdp-overshoot": [(PALETTE[4], "p")],
    "cmdp-hinge": [(PALETTE[5], "h")],
    "cmdp-adaptive": [((0.35, 0.05, 0.25), "H")],
    "saute-constant": [(PALETTE[6], "d")],
    "worst-case": [((0.65, 0.6, 0.0), (6, 1, 0))],
    "dual": [(PALETTE[9], "<")],
    "minillm": [((0.0, 0.3, 0.25), ">")],
    "kdrl": [((0.15, 0.2, 0.55), "8")],
    "trl-grpo": [((0.6, 0.35, 0.0), (4, 1, 45))],
    "trl-gkd": [((0.3, 0.75, 0.5), (4, 1, 0))],
}
OUTLINED = ("trl-grpo", "trl-gkd")  # drawn as outlines: trl-grpo coincides with grpo
LABELS = {"accuracy": "accuracy, sampled (%)", "csr": "CSR (%)"}
SHORT = {"accuracy": "accuracy", "csr": "CSR", "accuracy_within": "accuracy within budget", "validity": "validity"}
CAPACITIES = {"student-tenth": 0.1, "student": 0.3, "student-half": 0.5, "student-equal": 1.0}  # of the teacher's
TRACED = ("sft", "grpo", "gkd", "cmdp", "cmdp-hinge", "cmdp-adaptive")  # and the best soft Lagrangian: all are too many
ENDS = ["mean", "low", "high"]
FEW = 30  # completions: a share of fewer is not drawn
GREY = "0.35"


class Look(NamedTuple):
    """How a run is drawn."""

    colour: tuple
    marker: str | tuple
    line: str
    method: str


Looks = dict[str, Look]  # by run, in the order in which runs are listed


def looks(table: dict[str, Row]) -> Looks:
    """How each run is drawn: by its method; a run at other settings or of another start as the run it is tuned as."""
    runs, found = by_name(table), {}
    students = {name: row for name, row in runs.items() if row.family == "method" and row.start != "teacher"}
    for method, variants in STYLES.items():
        own = [name for name, row in students.items() if row.method == method]
        line = "-" if method in BUDGET_FREE else "--"
        drawn = zip(own, itertools.cycle(variants), strict=False)
        found |= {name: Look(*variant, line, method) for name, variant in drawn}
    found |= {name: Look((0.0, 0.0, 0.0), "*", "-", "sft") for name, row in runs.items() if row.start == "teacher"}
    return found | {name: found[row.tuned] for name, row in runs.items() if row.tuned in found and name not in found}


def draw(subject: str) -> None:
    """Draw the figures of `subject`: default, study or theory. Raises `ValueError` for another."""
    from replication.theory.plots import draw_all as draw_theory  # which imports this module's style

    subjects = {"default": (draw_default, RESULTS), "study": (draw_study, RESULTS)}
    subjects["theory"] = (draw_theory, RESULTS / "theory")
    if subject not in subjects:
        raise ValueError(f"There are figures of {', '.join(subjects)}, not of {subject!r}.")
    function, results = subjects[subject]
    function(results, FIGURES / subject)


def draw_default(results: Path, folder: Path) -> None:
    """Draw the figures of the default experiment into `folder`, which is replaced as a whole."""
    style, budget = looks(rows()), read_yaml(PARAMS)["budget"]["budget"]
    summary, positions, curves = (pd.read_csv(results / f"{name}.csv") for name in ("summary", "positions", "curves"))
    completions = gather("completions", rows(part="default"), results / "runs")
    sampled = completions[(completions["split"] == "test") & (completions["decoding"] == "sampled")]
    figures = {
        "frontier": lambda: trade_off(summary, style, budget),
        "cost_by_position": lambda: cost_by_position(positions, style, budget),
        "cost_distribution": lambda: cost_distribution(sampled, style, budget),
        "training": lambda: training(curves, style),
    }
    _draw(figures, folder)


def draw_study(results: Path, folder: Path) -> None:
    """Draw the figures of the study into `folder`, which is replaced as a whole.

    Raises:
        FileNotFoundError: a table is not in `results`/study.
    """
    style, target = looks(rows()), read_yaml(EXPERIMENTS)["claims"]["target"]
    soft, tables = read_yaml(results / "chosen.yaml")["best"]["soft"], {}
    for name in ("ablations", "frontier", "paired", "strength", "summary", "violation"):
        if not (path := results / "study" / f"{name}.csv").is_file():
            raise FileNotFoundError(f"{path} is missing: `make study` writes the study's tables.")
        tables[name] = pd.read_csv(path)
    figures = {
        "frontier": lambda: frontier(tables["frontier"], style, target),
        "paired": lambda: paired(tables["paired"], style, soft),
        "sensitivity": lambda: sensitivity(tables["strength"]),
        "ablations": lambda: ablations(tables["ablations"], style, rows()),
        "capacity": lambda: capacity(tables["summary"], style),
        "violation": lambda: violation(tables["violation"], style, [*TRACED, soft]),
        "drift": lambda: drift(tables["summary"], style),
    }
    _draw(figures, folder)


def _draw(figures: dict, folder: Path) -> None:
    with whole(folder) as unfinished:
        for name, figure in figures.items():
            with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
                save(figure(), unfinished, name)


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """Write a figure into `folder` as SVG and PNG, the same bytes for the same figure, and close it."""
    with plt.rc_context({"svg.hashsalt": "cmdp"}):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=160)
    plt.close(figure)


# ---- the default experiment ----


def trade_off(summary: pd.DataFrame, style: Looks, budget: float) -> plt.Figure:
    """Accuracy against CSR, a point per run with its 95 % intervals."""
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    table = summary.set_index(["run", "measure"])
    for run in _ordered(style, summary["run"].unique()):
        (x, xerr), (y, yerr) = (_bars(table.loc[(run, name), ENDS]) for name in ("csr", "accuracy"))
        _point(axes, run, style[run], x, y, xerr=xerr, yerr=yerr)
    axes.set(xlabel=f"CSR at a budget of {budget:g} nats (%)", ylabel=LABELS["accuracy"])
    _percent(axes.xaxis, axes.yaxis)
    return _finished(figure, "Upper right is better: accurate, and within the budget", panels=[axes], style=style)


def cost_by_position(positions: pd.DataFrame, style: Looks, budget: float) -> plt.Figure:
    """Cumulative cost as the completion is written: median and upper tenth of trajectories, the budget drawn in."""
    mean = positions.groupby(["run", "position"], sort=False).mean(numeric_only=True).reset_index()
    palette = {run: look.colour for run, look in style.items()}
    grid = sns.FacetGrid(mean, col="run", hue="run", col_wrap=3, height=2.1, palette=palette)
    grid.map(plt.fill_between, "position", "q10", "q90", alpha=0.25, linewidth=0)
    grid.map(plt.plot, "position", "q50", linewidth=1.8)
    grid.refline(y=budget, color="black")
    grid.set_titles("{col_name}").set_axis_labels("position (tokens)", "cumulative cost (nats)")
    grid.figure.suptitle(
        "Line: median. Shade: 10 to 90 % of trajectories. Dashed: the budget", y=1.02, fontsize="medium"
    )
    return grid.figure


def cost_distribution(sampled: pd.DataFrame, style: Looks, budget: float) -> plt.Figure:
    """The spread of trajectories' costs, a box per run: quartiles, whiskers at 5 and 95 %."""
    runs = list(sampled["run"].unique())
    figure, axes = plt.subplots(figsize=(6.4, 0.42 * len(runs) + 1.2), layout="constrained")
    boxes = {"whis": (5, 95), "showfliers": False, "width": 0.65, "legend": False, "order": runs, "hue_order": runs}
    palette = [style[run].colour for run in runs]
    sns.boxplot(sampled, x="cost", y="run", hue="run", palette=palette, log_scale=True, ax=axes, **boxes)
    axes.axvline(budget, color="black", linestyle="--", linewidth=1)
    place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": "small"}
    axes.annotate("budget", (budget, 1.0), **place)
    _logarithmic(axes.xaxis)
    axes.set(xlabel="cost (nats) of a trajectory: quartiles, whiskers 5 to 95 %", ylabel="")
    return figure


def training(curves: pd.DataFrame, style: Looks) -> plt.Figure:
    """Training: accuracy, CSR and cost of the rollouts, a line per run, mean over seeds, smoothed."""
    titles = {"task_reward": "accuracy of rollouts (%)", "csr": "CSR of rollouts (%)", "cost/mean": "mean cost (nats)"}
    runs = _ordered(style, curves["run"].unique())
    figure, panels = _panels(len(titles), 3, (11, 3.4))
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for place, run in enumerate(runs):
            colour, marker, line, _ = style[run]
            mean = curves[curves["run"] == run].groupby("step")[column].mean()
            smooth = mean.rolling(max(1, len(mean) // 10), min_periods=1, center=True).mean()
            every = (place * len(smooth) // (5 * len(runs)), max(1, len(smooth) // 5))  # no marker upon another
            marks = {"marker": marker, "markevery": every, "markeredgecolor": "white", "markeredgewidth": 0.5}
            axes.plot(smooth, color=colour, linestyle=line, linewidth=1.3, markersize=5.5, label=run, **marks)
        _panel(axes, title)
        if column == "cost/mean":
            axes.set_yscale("log")
            _logarithmic(axes.yaxis)
    return _finished(
        figure, "What training does (dashed: methods that know the budget)", "step", panels=panels, style=style
    )


def token_ledger(ledger: pd.DataFrame, budget: float) -> plt.Figure:
    """One completion, token by token: its cost, and how the budget ran down (from `evaluation.ledger`)."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(0.34 * len(ledger) + 1.5, 4.2), sharex=True)
    place = range(len(ledger))
    top.bar(place, ledger["cost"], color=[PALETTE[3] if left < 0 else PALETTE[0] for left in ledger["remaining"]])
    top.set_ylabel("cost (nats)")
    top.set_title("Blue: within the budget. Red: the budget is exhausted", loc="left", fontsize="medium")
    bottom.step(place, ledger["remaining"], where="mid", color="black")
    bottom.axhline(0, color=PALETTE[3], linestyle="--", linewidth=1)
    bottom.set_ylabel(f"remaining of {budget:g}")
    bottom.set_xticks(place, ledger["token"], rotation=90, family="monospace")
    figure.tight_layout()
    return figure


# ---- the study ----


def frontier(table: pd.DataFrame, style: Looks, target: float) -> plt.Figure:
    """Accuracy against CSR, a panel per budget: the soft Lagrangians joined, runs trained for the budget ringed."""
    budgets = sorted(table["budget"].unique())
    columns = 3 if len(budgets) == 3 else 2
    size = (8.4, 2.7 * -(-len(budgets) // columns) + 1.2)
    figure, panels = _panels(len(budgets), columns, size, sharey=True)
    for axes, budget in zip(panels, budgets, strict=True):
        part = table[table["budget"] == budget].set_index("method")
        runs = _ordered(style, part.index)
        soft = [run for run in runs if style[run].method == "gkd-grpo"]
        axes.plot(*part.loc[soft, ["csr", "accuracy"]].T.to_numpy(), color=PALETTE[0], linewidth=1.2)
        for run in runs:
            row = part.loc[run]
            ring = {} if np.isnan(row["trained_at"]) else {"markeredgecolor": "black", "markeredgewidth": 1.2}
            ends = ([name, f"{name}_low", f"{name}_high"] for name in ("csr", "accuracy"))
            (x, xerr), (y, yerr) = (_bars(row[names]) for names in ends)
            _point(axes, run, style[run], x, y, xerr=xerr, yerr=yerr, zorder=4 if ring else 3, **ring)
        axes.axvline(target, color="black", linestyle="--", linewidth=1, zorder=1, label=f"CSR of {target:.0%}")
        _panel(axes, f"budget: {budget:g} {'nat' if budget == 1 else 'nats'}")
        axes.set(xlabel=LABELS["csr"], ylabel=LABELS["accuracy"] if axes in panels[::columns] else "")
        _percent(axes.xaxis)
    return _finished(
        figure,
        "Does a budget raise the CSR, and what does it cost in accuracy? (black edge: trained for it)",
        panels=panels,
        style=style,
    )


def paired(table: pd.DataFrame, style: Looks, soft: str) -> plt.Figure:
    """Every run's difference to the soft Lagrangian `soft`, paired over seeds and prompts, a panel per measure."""
    table = table[table["baseline"] == soft]
    runs = _ordered(style, table["run"].unique())
    figure = _forest(table, style, runs, runs, list(SHORT))
    below = f"points more than {soft} (right of 0 is better)"
    return _finished(figure, f"Which methods do better than the best soft Lagrangian, {soft}?", below)


def sensitivity(table: pd.DataFrame) -> plt.Figure:
    """Each method's measures by lambda; strengths near its best accuracy within the budget have a black edge."""
    strengths = table.groupby("method")["lam"].nunique()
    methods = [method for method in STYLES if strengths.get(method, 0) > 1]  # one strength has no range
    figure, panels = _panels(len(methods) or 1, len(methods) or 1, (8.4, 3.2), sharey=True)
    for axes, method in zip(panels, methods, strict=False):
        colour, marker = STYLES[method][len(STYLES[method]) // 2]
        part = table[table["method"] == method].sort_values("lam").set_index("measure")
        for measure, dash in (("csr", "--"), ("accuracy", ":")):
            x, y = part.loc[measure, ["lam", "mean"]].T.to_numpy()
            axes.plot(x, y, linestyle=dash, color=GREY, linewidth=1.2, label=SHORT[measure])
        within = part.loc["accuracy_within"]
        axes.plot(within["lam"], within["mean"], color=colour, linewidth=1.8, label=SHORT["accuracy_within"])
        for _, row in within.iterrows():
            edge, (y, yerr) = "black" if row["near_best"] else "white", _bars(row[ENDS])
            look = Look(colour, marker, "-", method)
            _point(axes, None, look, row["lam"], y, yerr=yerr, markeredgecolor=edge, markeredgewidth=1.3)
        axes.set(xscale="log", xlabel="λ", ylabel="%" if axes is panels[0] else "")
        _logarithmic(axes.xaxis, within["lam"])
        _panel(axes, method)
    return _finished(
        figure,
        "Over what range does λ work? (black edge: within 5 % of the method's best accuracy within budget)",
        panels=panels[:1],
    )


def ablations(table: pd.DataFrame, style: Looks, runs: dict[str, Row]) -> plt.Figure:
    """Each ablation's difference to the method it changes, below that method, paired over seeds and prompts."""
    methods, changed = _ordered(style, table["baseline"].unique()), by_name(runs)
    names = [run for method in methods for run in (method, *table.loc[table["baseline"] == method, "run"].unique())]
    settings = {name: ", ".join(f"{key}: {value}" for key, value in changed[name].settings.items()) for name in names}
    labels = [settings[name] or name for name in names]
    figure = _forest(table, style, names, labels, ["csr", "accuracy_within"])
    for axes in figure.axes:
        for method in methods:
            _point(axes, method, style[method], 0, names.index(method), markeredgecolor="black")
    for label in figure.axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in methods else "normal")
    return _finished(figure, "Which part of the method matters?", "points more than the method (bold) that is changed")


def capacity(table: pd.DataFrame, style: Looks) -> plt.Figure:
    """Accuracy and CSR of students with a tenth, three tenths, half and all of the teacher's parameters."""
    runs = _ordered(style, table.loc[table["family"] == "capacity", "tuned"].unique())
    usual = (table["family"] == "method") & (table["start"] == "student")
    teacher = table[(table["start"] == "teacher") & (table["measure"] == "accuracy")]["mean"]
    table = table[table["tuned"].isin(runs) & (usual | (table["family"] == "capacity"))]
    table = table.assign(capacity=table["start"].map(CAPACITIES))
    figure, panels = _panels(2, 2, (8.4, 3.4))
    for axes, measure in zip(panels, ("accuracy", "csr"), strict=True):
        for place, run in enumerate(runs):
            part = table[(table["tuned"] == run) & (table["measure"] == measure)].sort_values("capacity")
            at = part["capacity"] * 1.035 ** (place - (len(runs) - 1) / 2)  # side by side, not one upon another
            y, yerr = _bars(part[ENDS].T)
            _point(axes, run, style[run], at, y, yerr=yerr, linestyle=style[run].line)
        if measure == "accuracy" and len(teacher):
            axes.axhline(teacher.iloc[0], color="black", linestyle=":", label="the teacher")
        axes.set_xscale("log")
        _logarithmic(axes.xaxis, list(CAPACITIES.values()))
        _panel(axes, LABELS[measure])
    question = "Does a wider gap to the teacher change which method does best? (dashed: knows the budget)"
    return _finished(figure, question, "student's parameters, as a share of the teacher's", panels=panels, style=style)


def violation(table: pd.DataFrame, style: Looks, traced: list[str]) -> plt.Figure:
    """Accuracy, validity and confidence of completions by how much of the budget they spent, a line per run.

    A bin of fewer than `FEW` completions is left out.
    """
    table = table[table["count"] >= FEW]
    bins = table[["bin", "low"]].drop_duplicates().sort_values("low")
    position = {name: at for at, name in enumerate(bins["bin"])}
    runs = _ordered(style, table["run"].unique())
    shown = [run for run in runs if run in traced]
    titles = {"accuracy": "accuracy (%)", "validity": "every step valid (%)", "confidence": "confidence (%), own scale"}
    figure, panels = _panels(len(titles), 3, (9.4, 3.4))
    panels[1].sharey(panels[0])
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for run in runs:
            part = table[table["run"] == run].sort_values("low")
            at = part["bin"].map(position)
            if run in shown:
                at = at + 0.1 * (shown.index(run) - (len(shown) - 1) / 2)  # side by side, not one upon another
                options = {"linestyle": style[run].line, "markersize": 5, "linewidth": 1}
                _point(axes, run, style[run], at, part[column], **options)
            else:
                axes.plot(at, part[column], color="0.75", linewidth=0.8, zorder=1, label="other methods")
        axes.axvline((bins["low"] < 1).sum() - 0.5, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(list(position.values()), list(position), rotation=45, ha="right", rotation_mode="anchor")
        _panel(axes, title)
    below = "what a completion spent, as a multiple of the budget; dashed: all of it"
    return _finished(figure, "What breaks when the budget is exceeded?", below, panels=panels, style=style)


def drift(table: pd.DataFrame, style: Looks) -> plt.Figure:
    """What goes with the distance from the teacher: a point per run, against its mean cost; methods large."""
    table = table[table["start"].isin(["student", "teacher"])]
    families = table.drop_duplicates("run").set_index("run")["family"]
    table = table.set_index(["run", "measure"])
    titles = {
        "calibration_error": "calibration error (%; less is better)",
        "diversity": "variety of phrasing (%)",
        "style_distance": "distance from the teacher's phrasing (%)",
        "longer_accuracy": "accuracy on longer problems (%)",
    }
    figure, panels = _panels(4, 2, (8.4, 6.2), sharex=True)
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        for run in _ordered(style, families.index):
            if (run, measure) not in table.index:
                continue
            cost, (y, yerr) = table.loc[(run, "cost"), "mean"], _bars(table.loc[(run, measure), ENDS])
            small = {"markersize": 4.5, "alpha": 0.45, "label": None}
            options = {"yerr": yerr, "zorder": 3} if families[run] == "method" else small
            _point(axes, run, style[run], cost, y, **options)
        _panel(axes, title)
    for axes in panels[-2:]:
        axes.set_xlabel("cost (nats)")
    return _finished(
        figure, "What goes with drift from the teacher? (small: methods at other settings)", panels=panels, style=style
    )


# ---- parts of figures ----


def _ordered(style: Looks, runs: Iterable[str]) -> list[str]:
    runs = set(runs)
    return [run for run in style if run in runs]


def _panels(count: int, columns: int, size: tuple, **shared) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure and its first `count` panels, row by row."""
    lines = -(-count // columns)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **shared)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def _bars(ends) -> tuple[np.ndarray, np.ndarray]:
    """Means and how far their intervals reach below and above, (2, n), of means, lower and upper ends: (3, ...)."""
    mean, low, high = np.asarray(ends, dtype=float)
    return mean, np.clip([mean - low, high - mean], 0, None).reshape(2, -1)


def _point(axes: plt.Axes, run: str | None, look: Look, x, y, **options):
    """Points of a run in its colour and marker, with what bars there are."""
    usual = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6, "elinewidth": 0.9, "linestyle": ""}
    if look.method in OUTLINED:
        usual |= {"markerfacecolor": "none", "markeredgecolor": look.colour, "markeredgewidth": 1.2, "markersize": 6}
    options = usual | {"label": run} | options
    if isinstance(look.marker, tuple) or look.marker == "*":  # stars have less ink
        options["markersize"] *= 1.6
    return axes.errorbar(x, y, color=look.colour, marker=look.marker, **options)


def _finished(
    figure: plt.Figure, question: str, below: str = "", panels: Iterable[plt.Axes] = (), style: Looks | None = None
) -> plt.Figure:
    """The figure with the question it answers above it, what its horizontal axes show below, and one legend of every
    run that any of `panels` shows: at the right, or below where it is long."""
    figure.suptitle(question, x=0.01, ha="left", fontweight="bold", fontsize="medium")
    figure.supxlabel(below, fontsize="medium")
    figure.get_layout_engine().set(h_pad=0.07)
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        names = [*_ordered(style or {}, found), *(name for name in found if name not in (style or {}))]
        place = {"loc": "outside right center"} if len(names) < 11 else {"loc": "outside lower center", "ncols": 5}
        figure.legend([found[name] for name in names], names, frameon=False, **place)
    return figure


def _panel(axes: plt.Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    _percent(axes.yaxis)


def _percent(*axes) -> None:
    """Shares as per cent, at round numbers, none of them rounded."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}")


def _logarithmic(axis, ticks=None) -> None:
    """Ticks of a log axis in plain figures, by default at 1, 2 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _forest(table: pd.DataFrame, style: Looks, runs: list[str], labels: list[str], measures: list[str]) -> plt.Figure:
    """Paired differences in points: a row per run, a panel per measure; a row of no difference stays empty."""
    table = table.set_index(["run", "measure"])
    size = (2.8 + 1.7 * len(measures), 0.28 * len(runs) + 1.3)
    figure, panels = _panels(len(measures), len(measures), size, sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        for place, run in enumerate(runs):
            if (run, measure) in table.index:
                x, xerr = _bars(100 * table.loc[(run, measure), ["difference", "low", "high"]])
                _point(axes, run, style[run], x, place, xerr=xerr, markersize=6.5)
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        axes.set_title(SHORT[measure], loc="left", fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", linewidth=0.4)
    panels[0].set_yticks(range(len(runs)), labels)
    panels[0].set_ylim(len(runs) - 0.3, -0.7)
    return figure
