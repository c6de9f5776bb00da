"""Figures of the default experiment, the study and the laptop's, from results files alone; plots.yaml has their looks.

A run looks like its method in all of them; the soft Lagrangians share a hue, darker with lambda. Methods that know the
budget have dashed lines and black edges. Bars are 95 % intervals; those of differences hold for all runs of a panel.
"""

import itertools
import math
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cmdp.storage import read_runs, read_yaml, whole
from replication.experiments import EXPERIMENTS, FIGURES, PARAMS, RESULTS, Row, rows
from replication.tables import BUDGET_FREE, COMPARED, by_name, of_profile, read_completions, soft_lambdas
from replication.tables import frontier as points_by_budget
from replication.tables import points as shown_as

PALETTE = sns.color_palette("colorblind")
STYLES, TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).values()
SOFT = "gkd-grpo"
OUTLINED = ("trl-grpo", "trl-gkd")  # drawn as outlines: they come close to grpo and gkd
TRACED = ("sft", "grpo", "gkd", "cmdp", "cmdp-hinge", "cmdp-chance", "dual")  # where all would be too many
WIDEST = 15  # points: an ablation that changes more is a number at the edge
FEW = 30  # completions: a share of fewer is not drawn
EDGE = {"markeredgecolor": "black", "markeredgewidth": 1.2}
DASHED = {"color": "black", "linestyle": "--", "linewidth": 1}
Look = namedtuple("Look", "colour marker line method")
Style = dict[str, Look]


def looks(runs: dict[str, Row], lambdas: dict[str, float]) -> Style:
    """How each run is drawn, by name, in the order of the legends: by its method, the soft Lagrangians of `lambdas` in
    their order; a run at another budget, at other settings or of another start as the run that it changes."""
    methods, found = [name for name, row in runs.items() if row.family == "method"], {}
    students = [name for name in methods if runs[name].start != "teacher"]
    for method, variants in STYLES.items():
        own, line = [name for name in students if runs[name].method == method], "-" if method in BUDGET_FREE else "--"
        if method == SOFT:
            own, (hue, marker) = [*lambdas], variants[0]
            variants = [(colour, marker) for colour in sns.light_palette(hue, len(own) + 2)[2:]]
        found |= {name: Look(*look, line, method) for name, look in zip(own, itertools.cycle(variants), strict=False)}
    found |= {name: Look("black", "*", "-", "sft") for name in methods if name not in students}
    of = {name: row.tuned for name, row in runs.items()} | shown_as(runs)
    return found | {name: found[other] for name, other in of.items() if other in found and name not in found}


def draw(subject: str, results: Path = RESULTS, folder: Path = FIGURES) -> None:
    """Draw the figures of `subject` (default, study, theory, laptop) into its folder of `folder`, replaced as a whole.
    Raises `ValueError` for another subject, `FileNotFoundError` where a table or a run is not in `results`."""
    from replication.theory.plots import draw_all as draw_theory  # which imports this module's style

    if subject == "theory":
        return draw_theory(results / "theory", folder / "theory")
    if subject not in ("default", "study", "laptop"):
        raise ValueError(f"There are figures of default, study, theory and laptop, not of {subject!r}.")
    with whole(folder / subject) as made, sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        drawn = laptop_figures(results) if subject == "laptop" else figures(subject, results)
        for name, figure in drawn.items():
            save(figure, made, name)


def figures(subject: str, results: Path) -> dict[str, plt.Figure]:
    """The figures of `subject`, default or study, by name."""

    def read(name: str) -> pd.DataFrame:
        if not (path := results / f"{name}.csv").is_file():
            raise FileNotFoundError(f"{path} is missing: run `python -m replication tables` for its part first.")
        return pd.read_csv(path)

    table, budget = by_name(rows()), read_yaml(PARAMS)["budget"]["budget"]
    target, part = read_yaml(EXPERIMENTS)["claims"]["target"], None if subject == "study" else subject
    style = looks(table, soft_lambdas(table, read_yaml(results / "chosen.yaml")["runs"]))
    runs, sampled = by_name(rows(part=part)), read_completions(results, part).query("decoding == 'sampled'")
    if subject == "default":
        return of_one(sampled, runs, read("prices"), read("positions"), read("curves"), style, budget, target)
    return {
        "ceiling": ceiling(kept(sampled, runs, target), read("prices"), style, budget, target),
        "frontier": frontier(read("study/frontier"), style, target),
        "equal_csr": equal_csr(read("study/equal_csr"), style),
        "nats": nats(read("ceiling"), style, runs),
        "ablations": ablations(read("study/ablations"), style, runs),
        "capacity": capacity(read("study/summary"), style, runs, target),
        "violation": violation(read("study/violation"), style),
    }


def laptop_figures(results: Path) -> dict[str, plt.Figure]:
    """The figures of profiles/laptop.yaml, by name."""
    sampled, runs, lambdas, budget = of_profile(results / "laptop-gpu")
    positions, curves = (read_runs(results / "laptop-gpu" / name) for name in ("positions", "training"))
    prices, target = pd.read_csv(results / "smollm2" / "ceiling.csv"), read_yaml(EXPERIMENTS)["claims"]["target"]
    return of_one(sampled, runs, prices, positions, curves, looks(runs, lambdas), budget, target)


def of_one(sampled, runs, prices, positions, curves, style: Style, budget: float, target: float) -> dict:
    """The figures of an experiment at one budget, by name, from its tables."""
    return {
        "ceiling": ceiling(kept(sampled, runs, target), prices, style, budget, target),
        "frontier": frontier(points_by_budget(sampled, runs, budget), style, target),
        "cost_by_position": cost_by_position(positions, style, budget),
        "cost_distribution": cost_distribution(sampled, style, budget, target),
        "training": training(curves, style),
    }


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """Write a figure into `folder` as SVG and PNG, the same bytes for the same figure, and close it."""
    with plt.rc_context({"svg.hashsalt": "cmdp"}):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=160)
    plt.close(figure)


# ---- what nats buy ----


def kept(sampled: pd.DataFrame, runs: dict[str, Row], target: float) -> pd.DataFrame:
    """Of each of the student's runs, at its own or another budget: its `method`, the `nats` within which a share
    `target` of its completions stay, and its accuracy without luck, which the ceiling knows nothing of: a right answer
    after slips does not count."""
    methods = shown_as(runs)
    grouped = sampled[sampled["run"].isin(methods)].groupby("run", sort=False)
    table = pd.DataFrame({"nats": grouped["cost"].quantile(target), "accuracy": grouped["right"].mean()})
    return table.assign(method=table.index.map(methods)).reset_index()


def ceiling(table: pd.DataFrame, prices: pd.DataFrame, style: Style, budget: float, target: float) -> plt.Figure:
    """Accuracy against nats: the ceiling of every method, both exact optima, and the trained students of `kept`."""
    share, texts = f"{100 * target:g} %", TEXTS["ceiling"]
    figure, panels = _panels("ceiling", below=texts["below"].format(share=share))
    axes = panels["accuracy"]
    axes.fill_between(prices["budget"], prices["low"], prices["high"], color="0.6", alpha=0.35, linewidth=0)
    axes.fill_between(prices["budget"], prices["soft"], prices["budgeted"], color=PALETTE[8], alpha=0.3, linewidth=0)
    for (name, text), dash in zip(texts["lines"].items(), ("-", "--", "--"), strict=True):
        colour = STYLES[SOFT][0][0] if name == "soft" else "black"
        axes.plot(prices["budget"], prices[name], dash, color=colour, linewidth=1.3, label=text.format(share=share))
    limits = 0.045, 4  # nats; beyond: a method that collapsed
    table = table[table["nats"] < limits[1]]
    _soft(axes, table.set_index("method"), "nats", "accuracy", style)
    for run, look, own in _by_run(table, style, "method"):
        own = own.sort_values("nats")
        if run in TRACED:
            options = {} if look.method in BUDGET_FREE else EDGE | {"linestyle": ":"}
            _point(axes, run, look, own["nats"], own["accuracy"], zorder=4, **options)
        elif look.method != SOFT:
            axes.plot(own["nats"], own["accuracy"], "o", color="0.55", markersize=3, label="other methods")
    axes.axvline(budget, **DASHED, zorder=1)
    place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top", "fontsize": "small"}
    axes.text(1.02 * budget, 0.98, "budget", **place)
    axes.set(xscale="log", xlim=limits)
    _logarithmic(axes.xaxis)
    return _legend(figure, style)


def nats(table: pd.DataFrame, style: Style, runs: dict[str, Row]) -> plt.Figure:
    """How many of each run's nats bought accuracy, and how many nothing; the share of its ceiling beside the bar."""
    shown = [run for run in style if run in set(table["run"]) and runs[run].family == "method" and run != "teacher"]
    table = table.set_index("run").loc[shown]
    figure, panels = _panels("nats", size=(7.6, 0.27 * len(shown) + 1.5))
    axes, place = panels["nats"], np.arange(len(shown))
    bars = {"height": 0.66, "edgecolor": "black", "linewidth": 0.5}
    axes.barh(place, table["useful"], color=[style[run].colour for run in shown], **bars)
    wasted = axes.barh(place, table["wasted"], left=table["useful"], color="white", hatch="////", **bars)
    texts = [f"{100 * row.accuracy:.0f} % of at most {100 * row.ceiling:.0f} %" for row in table.itertuples()]
    axes.bar_label(wasted, texts, padding=5, fontsize="small")
    axes.set_yticks(place, shown)
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, 1.3 * table["cost"].max()))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.grid(axis="y", visible=False)
    return figure


def cost_distribution(sampled: pd.DataFrame, style: Style, budget: float, target: float) -> plt.Figure:
    """The share of each run's completions that cost at most so much: its CSR at every budget."""
    figure, panels = _panels("cost_distribution")
    axes, shares = panels["csr"], np.linspace(0, 1, 401)
    for place, (run, look, own) in enumerate(_by_run(sampled[sampled["cost"] > 0], style)):
        line = {"linestyle": look.line, "marker": look.marker, "markevery": (20 + 7 * place % 60, 60), "ms": 5}
        axes.plot(own["cost"].quantile(shares), shares, color=look.colour, linewidth=1.2, label=run, **line)
    axes.axvline(budget, **DASHED, zorder=1)
    axes.axhline(target, **DASHED, zorder=1)
    axes.set(xscale="log", xlim=(0.02, None), ylim=(0, 1.01))
    _logarithmic(axes.xaxis)
    return _legend(figure, style)


def cost_by_position(positions: pd.DataFrame, style: Style, budget: float) -> plt.Figure:
    """Cumulative cost as the completion is written: median and middle 80 % of trajectories, the budget drawn in."""
    mean = positions.query("mean > 0").groupby(["run", "position"]).mean(numeric_only=True).reset_index()
    colours = {run: look.colour for run, look, _ in _by_run(mean, style)}
    grid = sns.FacetGrid(mean, col="run", col_order=[*colours], hue="run", palette=colours, col_wrap=5, height=1.75)
    grid.map(plt.fill_between, "position", "q10", "q90", alpha=0.25, linewidth=0)
    grid.map(plt.plot, "position", "q50", linewidth=1.8)
    grid.refline(y=budget, color="black")
    grid.set_titles("{col_name}").set_axis_labels("position (tokens)", "nats")
    heading = "Cumulative cost. Line: median. Shade: 10 to 90 % of trajectories. Dashed: the budget"
    grid.figure.suptitle(heading, y=1.03, fontsize="medium")
    return grid.figure


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
            line.set(marker=look.marker, markevery=every, ms=6, markeredgecolor="white", markeredgewidth=0.4)
    return _legend(figure, style)


def ledger(student, teacher, tokenizer, problem: dict, budget: float, length: int, seed: int) -> pd.DataFrame:
    """Sample one completion of at most `length` tokens and account for it: `token`, its `cost`, and what `remaining`
    (z_t) it leaves of the `budget`, in nats."""
    import torch

    from cmdp.evaluation import generate, score

    torch.manual_seed(seed)
    with torch.no_grad():
        ids, attention, completion, mask = generate(student, tokenizer, [problem["prompt"]], True, length)
        cost = score(student, teacher, len(tokenizer), ids, attention, mask)[0][0, : int(mask.sum())]
    tokens = tokenizer.convert_ids_to_tokens(completion[0, : len(cost)])
    return pd.DataFrame({"token": tokens, "cost": cost, "remaining": budget - cost.cumsum(0)})


def token_ledger(ledger: pd.DataFrame, budget: float) -> plt.Figure:
    """One completion, token by token: its cost, and how the budget ran down (from `ledger`)."""
    size = (0.34 * len(ledger) + 2.5, 4.2)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=size, sharex=True, layout="tight")
    place, left = range(len(ledger)), ledger["remaining"]
    top.bar(place, ledger["cost"], color=[PALETTE[3] if nats < 0 else PALETTE[0] for nats in left])
    top.set_title("blue: within the budget\nred: it is exhausted", loc="left", fontsize="medium")
    top.set(ylabel="cost (nats)")
    bottom.step(place, left, where="mid", color="black")
    bottom.axhline(0, **DASHED | {"color": PALETTE[3]})
    bottom.set(ylabel=f"remaining of {budget:g}")
    bottom.set_xticks(place, ledger["token"], rotation=90, family="monospace")
    return figure


# ---- comparisons ----


def frontier(table: pd.DataFrame, style: Style, target: float) -> plt.Figure:
    """Accuracy against CSR, a panel per budget: the soft Lagrangian's curve, runs trained for the budget ringed."""
    budgets = {budget: f"budget: {budget:g} nats" for budget in sorted(table["budget"].unique())}
    return _plane("frontier", table.assign(panel=table["budget"]), budgets, style, target)


def capacity(summary: pd.DataFrame, style: Style, runs: dict[str, Row], target: float) -> plt.Figure:
    """Accuracy against CSR at the default budget, a panel per student: one of a third of the parameters, the default
    one, and the teacher distilled into itself."""
    tuned = {row.tuned for row in runs.values() if row.family == "capacity"}
    shown = [name for name, row in runs.items() if row.tuned in tuned and not row.settings and name != "teacher"]
    about = {"index": ["run", "tuned", "start"], "columns": "measure", "values": ["mean", "low", "high"]}
    table = summary[summary["run"].isin(shown)].pivot(**about)
    table.columns = [f"{measure}_{end}".removesuffix("_mean") for end, measure in table.columns]
    table = table.reset_index().rename(columns={"tuned": "method", "start": "panel"})
    table["trained_at"] = [None if runs[run].method in BUDGET_FREE else 1 for run in table["run"]]
    starts, there = TEXTS["capacity"]["starts"], {"student", *table["panel"]}
    return _plane("capacity", table, {start: starts[start] for start in starts if start in there}, style, target)


def _plane(name: str, table: pd.DataFrame, titles: dict, style: Style, target: float) -> plt.Figure:
    """Accuracy against CSR in the panels `titles` of column `panel`, a point per `method`."""
    figure, panels = _panels(name, panels=titles, size=(max(7.4, 3.2 * len(titles) + 0.8), 4.8))
    for title, axes in panels.items():
        part = table[table["panel"] == title]
        _soft(axes, part.set_index("method"), "csr", "accuracy", style)
        for run, look, own in _by_run(part, style, "method"):
            if look.method != SOFT:
                x, y = (own[[column, f"{column}_low", f"{column}_high"]].T for column in ("csr", "accuracy"))
                ringed = own["trained_at"].notna().all()
                _point(axes, run, look, x, y, zorder=3 + ringed, **EDGE if ringed else {})
        axes.axvline(target, **DASHED, zorder=1, label=f"CSR of {100 * target:g} %")
        axes.set(xlabel="CSR (%)", ylabel="accuracy, sampled (%)" if axes.get_subplotspec().is_first_col() else "")
        _percent(axes.xaxis)
    return _legend(figure, style)


def equal_csr(table: pd.DataFrame, style: Style) -> plt.Figure:
    """Each constrained method's accuracy minus the soft Lagrangian's at the same CSR, a panel per budget, with the CSR
    at the right: hollow where it is stricter than every lambda, no point where it is looser."""
    labels = [method for method in style if method in set(table["method"])]
    budgets = {budget: f"trained for {budget:g} nats" for budget in sorted(table["budget"].unique())}
    figure, panels = _forest("equal_csr", budgets, dict.fromkeys(labels))
    for budget, axes in panels.items():
        for method, look, own in _by_run(table[table["budget"] == budget], style, "method"):
            row, place = own.iloc[0], labels.index(method)
            hollow = {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.4}
            ends = 100 * own[["difference", "low", "high"]].T
            _point(axes, method, look, ends, place, **hollow if row["place"] == "stricter" else EDGE)
            text = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": "small", "color": "0.25"}
            axes.text(1.02, place, f"{100 * row['csr']:.0f} %", **text)
    return figure


def ablations(table: pd.DataFrame, style: Style, runs: dict[str, Row]) -> plt.Figure:
    """Each ablation's difference to the method it changes, below that method, paired over seeds and prompts."""
    labels, places = {}, {}
    for method, _, own in _by_run(table, style, "baseline"):
        places[method] = len(labels)
        for run in (method, *own["run"].unique()):
            labels[run] = ", ".join(f"{key}: {value}" for key, value in runs[run].settings.items()) or run
    figure, panels = _forest("ablations", {name: COMPARED[name] for name in ("accuracy", "csr")}, labels)
    for measure, axes in panels.items():
        for run, look, own in _by_run(table[table["measure"] == measure], style):
            place, difference = [*labels].index(run), 100 * own["difference"].iloc[0]
            _point(axes, run, look, 100 * own[["difference", "low", "high"]].T, place)
            if abs(difference) > WIDEST:  # it would flatten all others
                side = "left" if difference < 0 else "right"
                axes.text(math.copysign(0.95 * WIDEST, difference), place, f"{difference:+.0f}", ha=side, va="center")
        axes.set_xlim(-WIDEST, WIDEST)
        for method, place in places.items():
            _point(axes, method, style[method], 0, place, markeredgecolor="black")
            figure.axes[0].get_yticklabels()[place].set_fontweight("bold")
    return figure


def _forest(name: str, titles: dict, labels: dict) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """Panels of differences in points, with a row per run of `labels` (its own name where it has none)."""
    figure, panels = _panels(name, panels=titles, size=(2.4 + 2.2 * len(titles), 0.3 * len(labels) + 1.5))
    for axes in panels.values():
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", linewidth=0.4)
        axes.set_yticks(range(len(labels)), [label or run for run, label in labels.items()])
        axes.set_ylim(len(labels) - 0.3, -0.7)
    return figure, panels


def violation(table: pd.DataFrame, style: Style) -> plt.Figure:
    """Accuracy of completions by how much of the budget they spent, and how many spent so much, a line per run; a bin
    of fewer than `FEW` completions has no accuracy."""
    table = table.sort_values("low").assign(share=table["count"] / table.groupby("run")["count"].transform("sum"))
    bins, shown = list(table["bin"].unique()), [run for run in style if run in TRACED and run in set(table["run"])]
    figure, panels = _panels("violation")
    for (run, look, own), (column, axes) in itertools.product(_by_run(table, style), panels.items()):
        own = own[own["count"] >= FEW] if column == "accuracy" else own
        at = own["bin"].map(bins.index)
        if run in shown:
            at = at + 0.09 * (shown.index(run) - (len(shown) - 1) / 2)  # side by side
            _point(axes, run, look, at, own[column], linestyle=look.line, markersize=5, linewidth=1)
        else:
            axes.plot(at, own[column], color="0.75", linewidth=0.8, zorder=1, label="other methods")
    for axes in panels.values():
        axes.axvline(table.loc[table["low"] < 1, "bin"].nunique() - 0.5, **DASHED)
        axes.set_xticks(range(len(bins)), bins, rotation=45, ha="right", rotation_mode="anchor")
    return _legend(figure, style)


# ---- drawing ----


def _by_run(table: pd.DataFrame, style: Style, column: str = "run") -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """Each run that `column` names, in the order of `style`, its look and its rows."""
    groups = dict(list(table.groupby(column)))
    return ((run, look, groups[run]) for run, look in style.items() if run in groups)


def _panels(name: str, **changes) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """The figure `name` of plots.yaml, with `changes` to it, and its panels side by side, of shares in per cent."""
    about = {"below": "", "share": {}} | TEXTS[name] | changes
    titles, size = about["panels"], about["size"]
    figure, (row,) = plt.subplots(1, len(titles), figsize=size, squeeze=False, **about["share"], layout="constrained")
    figure.suptitle(about["question"], x=0.01, ha="left", fontweight="bold", fontsize="medium")
    figure.supxlabel(about["below"], fontsize="medium")
    figure.get_layout_engine().set(h_pad=0.07)
    panels = dict(zip(titles, row, strict=True))
    for shown, axes in panels.items():
        axes.set_title(titles[shown], loc="left", fontsize="medium")
        _percent(axes.yaxis)
    return figure, panels


def _soft(axes: plt.Axes, table: pd.DataFrame, x: str, y: str, style: Style) -> None:
    """The soft Lagrangians of `table`, joined in the order of lambda."""
    soft = table.loc[[run for run, look in style.items() if look.method == SOFT and run in table.index]]
    label = f"soft Lagrangian, {len(soft)} λ (dark: large)"
    axes.plot(soft[x], soft[y], color=STYLES[SOFT][0][0], linewidth=1.2, label=label if len(soft) else None)
    for run, row in soft.iterrows():
        _point(axes, None, style[run], row[x], row[y], zorder=3, markersize=6)


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
    lines = [name for name in found if name not in style]
    found = {name: found[name] for name in (*lines, *style) if name in found}
    place = {"loc": "outside right center"} if len(found) < 13 else {"loc": "outside lower center", "ncols": 5}
    figure.legend(found.values(), found.keys(), frameon=False, **place)
    return figure


def _percent(axis) -> None:
    """Shares as per cent, at round numbers, none of them rounded."""
    axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}")


def _logarithmic(axis) -> None:
    """Ticks of a log axis in plain figures, at 1, 2 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
