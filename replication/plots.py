"""Figures of the default experiment, from results files alone: SVG and PNG, for print and for the colour-blind."""

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt

from cmdp.collect import gather
from cmdp.storage import whole

# Families share a hue of seaborn's colour-blind palette; within one, runs differ by marker.
PALETTE = sns.color_palette("colorblind")
FAMILIES = {
    "sft": (PALETTE[7], "s"),
    "grpo": (PALETTE[1], "X"),
    "gkd": (PALETTE[2], "P"),
    "gkd-grpo": (PALETTE[0], "o"),
    "cmdp": (PALETTE[3], "D"),
    "cmdp-overshoot": (PALETTE[4], "^"),
    "cmdp-hinge": (PALETTE[5], "p"),
    "cmdp-adaptive": ((0.35, 0.05, 0.25), "H"),
    "saute-constant": (PALETTE[6], "d"),
    "worst-case": ((0.65, 0.6, 0.0), (6, 1, 0)),
    "dual": (PALETTE[9], "<"),
    "minillm": ((0.0, 0.3, 0.25), ">"),
    "kdrl": ((0.15, 0.2, 0.55), "h"),
    "trl-grpo": ((0.6, 0.35, 0.0), (4, 1, 45)),
    "trl-gkd": ((0.3, 0.75, 0.5), (4, 1, 0)),
    "teacher": ((0.0, 0.0, 0.0), "*"),
}
MARKERS = {"weak": "v", "medium": "o", "strong": "^", "accuracy": "8"}


def family(run: str) -> str:
    """The method that a run or an arm is named for."""
    return max((name for name in FAMILIES if run.startswith(name)), key=len, default="sft")


def style(run: str) -> tuple:
    """(colour, marker) of a run, the same in every figure."""
    colour, marker = FAMILIES[family(run)]
    return colour, MARKERS.get(run.rpartition("-")[2], marker)


def draw_all(results: Path, folder: Path, params: dict) -> None:
    """Draw every figure into `folder`, which is replaced as a whole."""
    budget = params["budget"]["budget"]
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.1)
    summary = pd.read_csv(results / "summary.csv")
    curves = pd.read_csv(results / "curves.csv")
    positions = pd.read_csv(results / "positions.csv")
    completions = gather(results / "runs", params)
    with whole(folder) as unfinished:
        for name, figure in {
            "frontier": frontier(summary, budget),
            "cost_by_position": cost_by_position(positions, budget),
            "cost_distribution": cost_distribution(completions, list(summary["run"].unique()), budget),
            "training": training(curves),
        }.items():
            save(figure, unfinished, name)


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """Write a figure into `folder` as SVG and PNG, the same bytes for the same figure, and close it."""
    with plt.rc_context({"svg.hashsalt": "cmdp"}):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=160)
    plt.close(figure)


def frontier(summary: pd.DataFrame, budget: float) -> plt.Figure:
    """Accuracy against constraint satisfaction, a point a run with its 95 % intervals."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    table = summary.set_index(["run", "measure"])
    for run in summary["run"].unique():
        colour, marker = style(run)
        csr, accuracy = table.loc[(run, "csr")], table.loc[(run, "accuracy")]
        axes.errorbar(
            100 * csr["mean"],
            100 * accuracy["mean"],
            xerr=[[100 * (csr["mean"] - csr["low"])], [100 * (csr["high"] - csr["mean"])]],
            yerr=[[100 * (accuracy["mean"] - accuracy["low"])], [100 * (accuracy["high"] - accuracy["mean"])]],
            fmt=marker,
            color=colour,
            markersize=8,
            markeredgecolor="white",
            elinewidth=1,
            alpha=0.9,
            label=run,
        )
    axes.set_xlabel(f"trajectories within the budget of {budget:g} nats (%)")
    axes.set_ylabel("right answers, sampled (%)")
    axes.set_title("Upper right is better: right answers, within the budget", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def cost_by_position(positions: pd.DataFrame, budget: float) -> plt.Figure:
    """Cumulative cost as the completion is written: median and upper tenth of trajectories, the budget drawn in."""
    mean = positions.groupby(["run", "position"], sort=False).mean(numeric_only=True).reset_index()
    runs = list(positions["run"].unique())
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.2 * columns, 1.8 * rows + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, run in zip(grid.flat, runs, strict=False):
        group, (colour, _) = mean[mean["run"] == run], style(run)
        axes.fill_between(group["position"], group["q10"], group["q90"], color=colour, alpha=0.25, linewidth=0)
        axes.plot(group["position"], group["q50"], color=colour, linewidth=1.8)
        axes.axhline(budget, color="black", linestyle="--", linewidth=1)
        axes.set_title(run, fontsize="medium")
    for axes in list(grid.flat)[len(runs) :]:
        axes.set_visible(False)
    figure.supxlabel("position in the completion (tokens)", fontsize="medium")
    figure.supylabel("cumulative cost (nats)", fontsize="medium")
    figure.suptitle("Line: median. Shade: 10 to 90 % of trajectories. Dashed: the budget", fontsize="medium")
    return figure


def cost_distribution(completions: pd.DataFrame, runs: list[str], budget: float) -> plt.Figure:
    """How trajectories' costs are spread, a box a run: quartiles, whiskers at 5 and 95 %."""
    sampled = completions[completions["decoding"] == "sampled"]
    figure, axes = plt.subplots(figsize=(6.4, 0.42 * len(runs) + 1.2))
    sns.boxplot(
        sampled,
        x="cost",
        y="run",
        order=runs,
        hue="run",
        hue_order=runs,
        palette=[style(run)[0] for run in runs],
        whis=(5, 95),
        showfliers=False,
        width=0.65,
        legend=False,
        ax=axes,
    )
    axes.axvline(budget, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "budget", (budget, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize="small"
    )
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("cost of a trajectory (nats; quartiles, whiskers 5 to 95 %)")
    axes.set_ylabel("")
    return figure


def token_ledger(ledger: pd.DataFrame, budget: float) -> plt.Figure:
    """One completion, token by token: what each cost, and how the budget ran down (from `evaluation.ledger`)."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(0.34 * len(ledger) + 1.5, 4.2), sharex=True)
    place = range(len(ledger))
    colours = [PALETTE[3] if left < 0 else PALETTE[0] for left in ledger["remaining"]]
    top.bar(place, ledger["cost"], color=colours)
    top.set_ylabel("cost (nats)")
    top.set_title("Blue: within the budget. Red: the budget is exhausted", loc="left", fontsize="medium")
    bottom.step(place, ledger["remaining"], where="mid", color="black")
    bottom.axhline(0, color=PALETTE[3], linestyle="--", linewidth=1)
    bottom.set_ylabel(f"remaining of {budget:g}")
    bottom.set_xticks(place, ledger["token"], rotation=90, family="monospace")
    figure.tight_layout()
    return figure


def training(curves: pd.DataFrame) -> plt.Figure:
    """What training does: task reward, satisfaction and cost of the rollouts, a line a run, mean over seeds."""
    panels = {"task_reward": "task reward", "csr": "within the budget", "cost/mean": "mean cost (nats)"}
    figure, grid = plt.subplots(1, len(panels), figsize=(11, 3.2))
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        for run, group in curves.groupby("run", sort=False):
            colour, marker = style(run)
            mean = group.groupby("step")[column].mean()
            smooth = mean.rolling(max(1, len(mean) // 10), min_periods=1, center=True).mean()
            axes.plot(smooth.index, smooth, color=colour, marker=marker, markevery=0.2, markersize=5, label=run)
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize="medium")
    grid[-1].set_yscale("log")
    grid[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    return figure
