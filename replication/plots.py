"""Figures of the default experiment and of the study, from results files alone: SVG and PNG, readable in print and by
the colour-blind. plots.yaml has their looks and words.

A run has one colour and one marker throughout: those of its method, in shades where several runs share a method.
Methods that know the budget have dashed lines. Runs that were not made are left out. Bars are 95 % intervals; those of
differences hold for all runs of a figure at once. `style` holds the look of each run, in the order of the legends.
"""

import itertools
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from cmdp.storage import read_yaml, whole
from replication.experiments import EXPERIMENTS, FIGURES, PARAMS, RESULTS, Row, gather, rows
from replication.tables import BUDGET_FREE, COMPARED, by_name
from replication.tables import frontier as points_by_budget

PALETTE = sns.color_palette("colorblind")
STYLES, TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).values()
OUTLINED = ("trl-grpo", "trl-gkd")  # drawn as outlines: trl-grpo coincides with grpo
CAPACITIES = {"student-tenth": 0.1, "student": 0.3, "student-half": 0.5, "student-equal": 1.0}  # of the teacher's
TRACED = ("sft", "grpo", "gkd", "cmdp", "cmdp-hinge", "cmdp-adaptive")  # and the best soft Lagrangian: all are too many
ENDS = ["mean", "low", "high"]
FEW = 30  # completions: a share of fewer is not drawn
EDGE = {"markeredgecolor": "black", "markeredgewidth": 1.2}
DASHED = {"color": "black", "linestyle": "--", "linewidth": 1}
Look = namedtuple("Look", "colour marker line method")
Style = dict[str, Look]


def looks(table: dict[str, Row]) -> Style:
    """How each run is drawn: by its method; a run at other settings or of another start as the run it is tuned as."""
    runs, found = by_name(table), {}
    students = [name for name, row in runs.items() if row.family == "method" and row.start != "teacher"]
    for method, variants in STYLES.items():
        own, line = [name for name in students if runs[name].method == method], "-" if method in BUDGET_FREE else "--"
        found |= {name: Look(*look, line, method) for name, look in zip(own, itertools.cycle(variants), strict=False)}
    found |= {name: Look("black", "*", "-", "sft") for name, row in runs.items() if row.start == "teacher"}
    return found | {name: found[row.tuned] for name, row in runs.items() if row.tuned in found and name not in found}


def draw(subject: str, results: Path = RESULTS, folder: Path = FIGURES) -> None:
    """Draw the figures of `subject`, default, study or theory, into its folder of `folder`, replaced as a whole. Raises
    `ValueError` for another subject, `FileNotFoundError` where a table or a run is not in `results`."""
    from replication.theory.plots import draw_all as draw_theory  # which imports this module's style

    if subject == "theory":
        return draw_theory(results / "theory", folder / "theory")
    if subject not in (makers := {"default": _default, "study": _study}):
        raise ValueError(f"There are figures of {', '.join(makers)}, theory, not of {subject!r}.")
    with whole(folder / subject) as made, sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        for name, figure in makers[subject](results).items():
            save(figure, made, name)


def _default(results: Path) -> dict[str, plt.Figure]:
    runs, style, budget = rows(part="default"), looks(rows()), read_yaml(PARAMS)["budget"]["budget"]
    target = read_yaml(EXPERIMENTS)["claims"]["target"]
    sampled = gather("completions", runs, results / "runs").query("split == 'test' and decoding == 'sampled'")
    return {
        "frontier": frontier(points_by_budget(sampled, by_name(runs), budget), style, target),
        "cost_by_position": cost_by_position(_read(results / "positions.csv"), style, budget),
        "cost_distribution": cost_distribution(sampled, style, budget),
        "training": training(_read(results / "curves.csv"), style),
    }


def _study(results: Path) -> dict[str, plt.Figure]:
    style, soft = looks(rows()), read_yaml(results / "chosen.yaml")["best"]["soft"]
    target = read_yaml(EXPERIMENTS)["claims"]["target"]
    names = ("ablations", "frontier", "paired", "strength", "summary", "violation")
    tables = {name: _read(results / "study" / f"{name}.csv") for name in names}
    return {
        "frontier": frontier(tables["frontier"], style, target),
        "paired": paired(tables["paired"], style, soft),
        "sensitivity": sensitivity(tables["strength"]),
        "ablations": ablations(tables["ablations"], style, by_name(rows())),
        "capacity": capacity(tables["summary"], style),
        "violation": violation(tables["violation"], style, [*TRACED, soft]),
        "drift": drift(tables["summary"], style),
    }


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python -m replication tables` for its part first.")
    return pd.read_csv(path)


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """Write a figure into `folder` as SVG and PNG, the same bytes for the same figure, and close it."""
    with plt.rc_context({"svg.hashsalt": "cmdp"}):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=160)
    plt.close(figure)


def cost_by_position(positions: pd.DataFrame, style: Style, budget: float) -> plt.Figure:
    """Cumulative cost as the completion is written: median and middle 80 % of trajectories, the budget drawn in."""
    mean = positions.groupby(["run", "position"], sort=False).mean(numeric_only=True).reset_index()
    palette = {run: look.colour for run, look in style.items()}
    grid = sns.FacetGrid(mean, col="run", hue="run", col_wrap=3, height=2.1, palette=palette)
    grid.map(plt.fill_between, "position", "q10", "q90", alpha=0.25, linewidth=0)
    grid.map(plt.plot, "position", "q50", linewidth=1.8)
    grid.refline(y=budget, color="black")
    grid.set_titles("{col_name}").set_axis_labels("position (tokens)", "cumulative cost (nats)")
    heading = "Line: median. Shade: 10 to 90 % of trajectories. Dashed: the budget"
    grid.figure.suptitle(heading, y=1.02, fontsize="medium")
    return grid.figure


def cost_distribution(sampled: pd.DataFrame, style: Style, budget: float) -> plt.Figure:
    """The spread of trajectories' costs, a box per run: quartiles, whiskers at 5 and 95 %."""
    runs = list(sampled["run"].unique())
    figure, axes = plt.subplots(figsize=(6.4, 0.42 * len(runs) + 1.2), layout="constrained")
    boxes = {"whis": (5, 95), "showfliers": False, "width": 0.65, "legend": False, "order": runs, "hue_order": runs}
    palette = [style[run].colour for run in runs]
    sns.boxplot(sampled, x="cost", y="run", hue="run", palette=palette, log_scale=True, ax=axes, **boxes)
    axes.axvline(budget, **DASHED)
    axes.text(budget, 1, "budget", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize="small")
    _logarithmic(axes.xaxis)
    axes.set(xlabel="cost (nats) of a trajectory: quartiles, whiskers 5 to 95 %", ylabel="")
    return figure


def training(curves: pd.DataFrame, style: Style) -> plt.Figure:
    """Training: accuracy, CSR and cost of the rollouts, a line per run, mean over seeds, smoothed."""
    figure, panels = _panels("training")
    panels["cost/mean"].set_yscale("log")
    _logarithmic(panels["cost/mean"].yaxis)
    means, count = curves.groupby(["run", "step"])[[*panels]].mean().reset_index(), curves["run"].nunique()
    for place, (run, look, own) in enumerate(_by_run(means, style)):
        smooth = own.set_index("step").rolling(max(1, len(own) // 10), min_periods=1, center=True)[[*panels]].mean()
        every = (place * len(own) // (5 * count), max(1, len(own) // 5))  # no marker upon another
        for column, axes in panels.items():
            line = axes.plot(smooth[column], color=look.colour, linestyle=look.line, linewidth=1.3, label=run)[0]
            line.set(marker=look.marker, markevery=every, ms=5.5, markeredgecolor="white", markeredgewidth=0.5)
    return _legend(figure, style)


def token_ledger(ledger: pd.DataFrame, budget: float) -> plt.Figure:
    """One completion, token by token: its cost, and how the budget ran down (from `evaluation.ledger`)."""
    size = (0.34 * len(ledger) + 1.5, 4.2)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=size, sharex=True, layout="tight")
    place, left = range(len(ledger)), ledger["remaining"]
    top.bar(place, ledger["cost"], color=[PALETTE[3] if nats < 0 else PALETTE[0] for nats in left])
    top.set_title("Blue: within the budget. Red: the budget is exhausted", loc="left", fontsize="medium")
    top.set(ylabel="cost (nats)")
    bottom.step(place, left, where="mid", color="black")
    bottom.axhline(0, **DASHED | {"color": PALETTE[3]})
    bottom.set(ylabel=f"remaining of {budget:g}")
    bottom.set_xticks(place, ledger["token"], rotation=90, family="monospace")
    return figure


def frontier(table: pd.DataFrame, style: Style, target: float) -> plt.Figure:
    """Accuracy against CSR, a panel per budget: the soft Lagrangians joined, runs trained for the budget ringed."""
    budgets = sorted(table["budget"].unique())
    titles = {budget: f"budget: {budget:g} {'nat' if budget == 1 else 'nats'}" for budget in budgets}
    columns = {1: 1, 3: 3}.get(len(titles), 2)
    size = (8.4, 2.7 * -(-len(titles) // columns) + 1.2)
    figure, panels = _panels("frontier", panels=titles, columns=columns, size=size)
    soft = [run for run, look in style.items() if look.method == "gkd-grpo"]
    for budget, axes in panels.items():
        part = table[table["budget"] == budget]
        for run, look, own in _by_run(part, style, "method"):
            x, y = (own[[name, f"{name}_low", f"{name}_high"]].T for name in ("csr", "accuracy"))
            ringed = own["trained_at"].notna().all()
            _point(axes, run, look, x, y, zorder=3 + ringed, **EDGE if ringed else {})
        joined = part.set_index("method").reindex(soft).dropna(subset="csr")
        axes.plot(joined["csr"], joined["accuracy"], color=PALETTE[0], linewidth=1.2)
        axes.axvline(target, **DASHED, zorder=1, label=f"CSR of {target:.0%}")
        axes.set(xlabel="CSR (%)", ylabel="accuracy, sampled (%)" if axes.get_subplotspec().is_first_col() else "")
        _percent(axes.xaxis)
    return _legend(figure, style)


def paired(table: pd.DataFrame, style: Style, soft: str) -> plt.Figure:
    """Every run's difference to the soft Lagrangian `soft`, paired over seeds and prompts, a panel per measure."""
    table = table[table["baseline"] == soft]
    return _forest("paired", table, style, {run: run for run, *_ in _by_run(table, style)}, [*COMPARED], soft=soft)


def ablations(table: pd.DataFrame, style: Style, runs: dict[str, Row]) -> plt.Figure:
    """Each ablation's difference to the method it changes, below that method, paired over seeds and prompts."""
    labels, places = {}, {}
    for method, _, own in _by_run(table, style, "baseline"):
        places[method] = len(labels)
        for run in (method, *own["run"].unique()):
            labels[run] = ", ".join(f"{key}: {value}" for key, value in runs[run].settings.items()) or run
    figure = _forest("ablations", table, style, labels, ["csr", "accuracy_within"])
    for axes, (method, place) in itertools.product(figure.axes, places.items()):
        _point(axes, method, style[method], 0, place, markeredgecolor="black")
        figure.axes[0].get_yticklabels()[place].set_fontweight("bold")
    return figure


def _forest(name: str, table: pd.DataFrame, style: Style, labels: dict, measures: list[str], **words) -> plt.Figure:
    """Paired differences in points: a row per run of `labels`, empty if it has none, and a panel per measure."""
    count, titles = len(measures), {measure: COMPARED[measure] for measure in measures}
    size = (2.8 + 1.7 * count, 0.28 * len(labels) + 1.3)
    figure, panels = _panels(name, words, panels=titles, columns=count, size=size)
    for measure, axes in panels.items():
        for run, look, own in _by_run(table[table["measure"] == measure], style):
            _point(axes, run, look, 100 * own[["difference", "low", "high"]].T, [*labels].index(run), markersize=6.5)
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", linewidth=0.4)
    axes.set_yticks(range(len(labels)), labels.values())
    axes.set_ylim(len(labels) - 0.3, -0.7)
    return figure


def sensitivity(table: pd.DataFrame) -> plt.Figure:
    """Each method's measures by lambda; strengths near its best accuracy within the budget have a black edge."""
    strengths = table.groupby("method")["lam"].nunique()
    methods = {method: method for method in STYLES if strengths.get(method, 0) > 1}  # one strength has no range
    figure, panels = _panels("sensitivity", panels=methods or {"": ""}, columns=len(methods) or 1)
    panels[next(iter(panels))].set_ylabel("%")
    for method in methods:
        axes, look = panels[method], Look(*STYLES[method][len(STYLES[method]) // 2], "-", method)
        part = table[table["method"] == method].sort_values("lam").set_index("measure")
        for measure, dash, colour in (("csr", "--", "0.35"), ("accuracy", ":", "0.35"), ("accuracy_within", "-", None)):
            own = part.loc[measure]
            line = {"linestyle": dash, "color": colour or look.colour, "linewidth": 1.2 if colour else 1.8}
            axes.plot(own["lam"], own["mean"], label=COMPARED[measure], **line)
        for near, points in own.groupby("near_best"):
            _point(axes, None, look, points["lam"], points[ENDS].T, **EDGE if near else {})
        axes.set(xscale="log", xlabel="λ")
        axes.margins(x=0.09)
        _logarithmic(axes.xaxis, own["lam"])
    return _legend(figure, {})


def capacity(table: pd.DataFrame, style: Style) -> plt.Figure:
    """Accuracy and CSR of students with a tenth, three tenths, half and all of the teacher's parameters."""
    runs = set(table.loc[table["family"] == "capacity", "tuned"])
    teacher = table[(table["start"] == "teacher") & (table["measure"] == "accuracy")]["mean"]
    table = table[table["tuned"].isin(runs) & table["family"].isin(["method", "capacity"])]
    table = table.assign(capacity=table["start"].map(CAPACITIES)).dropna(subset="capacity").sort_values("capacity")
    figure, panels = _panels("capacity")
    for measure, axes in panels.items():
        for place, (run, look, own) in enumerate(_by_run(table[table["measure"] == measure], style, "tuned")):
            at = own["capacity"] * 1.035 ** (place - (len(runs) - 1) / 2)  # side by side
            _point(axes, run, look, at, own[ENDS].T, linestyle=look.line)
        axes.set_xscale("log")
        _logarithmic(axes.xaxis, list(CAPACITIES.values()))
    for accuracy in teacher:
        panels["accuracy"].axhline(accuracy, color="black", linestyle=":", label="the teacher")
    return _legend(figure, style)


def violation(table: pd.DataFrame, style: Style, traced: list[str]) -> plt.Figure:
    """Accuracy, validity and confidence of completions by how much of the budget they spent, a line per run; a bin of
    fewer than `FEW` completions is left out."""
    table = table[table["count"] >= FEW].sort_values("low")
    bins, shown = list(table["bin"].unique()), [run for run in style if run in traced and run in set(table["run"])]
    figure, panels = _panels("violation")
    panels["validity"].sharey(panels["accuracy"])
    for (run, look, own), (column, axes) in itertools.product(_by_run(table, style), panels.items()):
        at = own["bin"].map(bins.index)
        if run in shown:
            at = at + 0.1 * (shown.index(run) - (len(shown) - 1) / 2)  # side by side
            _point(axes, run, look, at, own[column], linestyle=look.line, markersize=5, linewidth=1)
        else:
            axes.plot(at, own[column], color="0.75", linewidth=0.8, zorder=1, label="other methods")
    for axes in panels.values():
        axes.axvline(table.loc[table["low"] < 1, "bin"].nunique() - 0.5, **DASHED)
        axes.set_xticks(range(len(bins)), bins, rotation=45, ha="right", rotation_mode="anchor")
    return _legend(figure, style)


def drift(table: pd.DataFrame, style: Style) -> plt.Figure:
    """What goes with the distance from the teacher: a point per run, against its mean cost; methods large."""
    table = table[table["start"].isin(["student", "teacher"])]
    cost = table[table["measure"] == "cost"].set_index("run")["mean"]
    figure, panels = _panels("drift")
    for measure, axes in panels.items():
        for run, look, own in _by_run(table[table["measure"] == measure], style):
            large = own["family"].iloc[0] == "method"
            options = {"label": run, "zorder": 3} if large else {"label": None, "markersize": 4.5, "alpha": 0.45}
            _point(axes, run, look, own["run"].map(cost), own[ENDS if large else "mean"].T, **options)
        axes.set_xlabel("cost (nats)" if axes.get_subplotspec().is_last_row() else "")
    return _legend(figure, style)


def _by_run(table: pd.DataFrame, style: Style, column: str = "run") -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """Each run that `column` names, in the order of `style`, its look and its rows."""
    groups = dict(list(table.groupby(column)))
    return ((run, look, groups[run]) for run, look in style.items() if run in groups)


def _panels(name: str, words: dict | None = None, **changes) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """The figure `name` of plots.yaml, with `changes` to what stands there and `words` in it, and its panels, of shares
    in per cent."""
    about = {"below": "", "share": {}} | TEXTS[name] | changes
    titles, columns = about["panels"], about["columns"]
    shape = {"nrows": -(-len(titles) // columns), "ncols": columns, "figsize": about["size"], "squeeze": False}
    figure, grid = plt.subplots(**shape, **about["share"], layout="constrained")
    figure.suptitle(about["question"].format_map(words or {}), x=0.01, ha="left", fontweight="bold", fontsize="medium")
    figure.supxlabel(about["below"].format_map(words or {}), fontsize="medium")
    figure.get_layout_engine().set(h_pad=0.07)
    for axes in grid.flat[len(titles) :]:
        axes.remove()
    panels = dict(zip(titles, grid.flat, strict=False))
    for shown, axes in panels.items():
        axes.set_title(titles[shown], loc="left", fontsize="medium")
        _percent(axes.yaxis)
    return figure, panels


def _point(axes: plt.Axes, run: str | None, look: Look, x, y, **options) -> None:
    """Points in a run's colour and marker, at numbers or with bars at means and both ends of their intervals (3, n)."""
    usual = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6, "elinewidth": 0.9, "linestyle": ""}
    if look.method in OUTLINED:
        usual |= {"markerfacecolor": "none", "markeredgecolor": look.colour, "markeredgewidth": 1.2, "markersize": 6}
    options = usual | {"label": run} | options
    if not isinstance(look.marker, str) or look.marker == "*":  # stars have less ink
        options["markersize"] *= 1.6
    for name, ends in (("x", np.asarray(x, dtype=float)), ("y", np.asarray(y, dtype=float))):
        options[name] = ends[0] if ends.ndim == 2 else ends
        if ends.ndim == 2:
            options[f"{name}err"] = np.clip([ends[0] - ends[1], ends[2] - ends[0]], 0, None)
    axes.errorbar(color=look.colour, marker=look.marker, **options)


def _legend(figure: plt.Figure, style: Style) -> plt.Figure:
    """The figure with one legend of all its panels: at the right, or below where it is long."""
    found = {}
    for axes in reversed(figure.axes):
        found |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    found = {name: found[name] for name in sorted(found, key=[*style, *found].index)}
    place = {"loc": "outside right center"} if len(found) < 11 else {"loc": "outside lower center", "ncols": 5}
    figure.legend(found.values(), found.keys(), frameon=False, **place)
    return figure


def _percent(axis) -> None:
    """Shares as per cent, at round numbers, none of them rounded."""
    axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}")


def _logarithmic(axis, ticks=None) -> None:
    """Ticks of a log axis in plain figures, by default at 1, 2 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
