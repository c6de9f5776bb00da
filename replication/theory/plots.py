"""Figures of the theory study, each drawn from its result files alone: SVG and PNG.

Colours are seaborn's colour-blind palette; what colour says, a marker, a dash or a label says too.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import PercentFormatter

from cmdp.storage import whole
from replication.plots import PALETTE, save
from replication.theory import OURS

BLUE, ORANGE, GREEN, RED, GREY = *PALETTE[:4], (0.45, 0.45, 0.45)


def draw_all(results: Path, folder: Path) -> None:
    """Draw every figure into `folder`, which is replaced as a whole."""
    with whole(folder) as unfinished:
        for draw in (learners, frontier, average, penalty, jump, exact_penalty, example):
            with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
                figure = draw(results)
            save(figure, unfinished, draw.__name__)


def learners(results: Path) -> plt.Figure:
    """Each method: reward against the exact optimum, and how often it violates."""
    rows = pd.read_csv(results / "against_optimum.csv")
    rows = rows[rows["budget"] == "all"]
    ideal = rows["method"].str.startswith("soft optimum")
    modes = ["closed form", *rows.loc[~ideal, "variant"].unique()]
    rows = rows[~ideal | (rows["method"] == "soft optimum, never")]
    order = rows.groupby("method")["of_optimum"].mean().sort_values().index.tolist()
    place = {method: row for row, method in enumerate(order)}
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 5.2), sharey=True)
    for mode, variant in enumerate(modes):
        part = rows[rows["variant"] == variant]
        at = part["method"].map(place) + (0.24 * (2 - mode) if mode else 0)
        for axis, name, sign in ((axes[0], "of_optimum", 1), (axes[1], "csr", -1)):
            value, low, high = (part[c] if sign > 0 else 1 - part[c] for c in (name, f"{name}_low", f"{name}_high"))
            low, high = (low, high) if sign > 0 else (high, low)
            axis.errorbar(
                value,
                at,
                xerr=np.abs([value - low, high - value]),
                fmt="*os^"[mode],
                markersize=(8, 4.2, 4.2, 4.2)[mode],
                color=("black", BLUE, ORANGE, GREEN)[mode],
                mfc=("black", BLUE, "white", "white")[mode],
                elinewidth=1.2,
                label=variant,
            )
    axes[0].axvline(1, color="black", lw=1)
    axes[0].text(1.02, 0.0, "exact optimum", rotation=90, va="bottom", fontsize=8)
    edge = 1.36
    axes[0].set(xlabel="reward / budgeted optimum", xlim=(0.3, edge))
    for method, part in rows[rows["of_optimum"] > edge].groupby("method"):
        reach = f"{part['of_optimum'].min():.0%} to {part['of_optimum'].max():.0%} →"
        axes[0].text(edge, place[method], reach, ha="right", va="center", fontsize=8.5)
    axes[1].axvline(0.01, color="black", lw=1, ls=":")
    axes[1].set(xlabel="trajectories that violate the budget")
    axes[1].set_xscale("symlog", linthresh=0.01)
    axes[1].set_xticks([0, 0.005, 0.01, 0.1, 1], ["0", "0.5%", "1%", "10%", "100%"])
    axes[1].set(xlim=(-0.0008, 1.3))
    axes[0].xaxis.set_major_formatter(PercentFormatter(1))
    labels = [f"{name} (ours)" if name in OURS else name for name in order]
    axes[0].set_yticks(range(len(order)), ["best soft λ, no violation" if "soft" in x else x for x in labels])
    for axis in axes:
        axis.grid(axis="y", lw=0.4)
    sns.despine(figure)
    figure.tight_layout()
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, bbox_to_anchor=(0.6, 1), fontsize=8
    )
    return figure


def frontier(results: Path) -> plt.Figure:
    """V(s_0, d), the soft Lagrangian's frontiers, and every sampled learner."""
    curve, rows = (pd.read_csv(results / f"{name}.csv") for name in ("frontier", "against_optimum"))
    optimum = pd.read_csv(results / "optimum.csv").groupby("budget")["lower"].mean()
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    axis.plot(curve["budget"], curve["optimum"], color="black", lw=2)
    end = curve.iloc[-1]
    soft = (("never", "never violates", "-"), ("rarely", "violates ≤ 5 %", "--"), ("on_average", "E[C] ≤ d", ":"))
    axis.text(end["budget"] + 0.005, end["optimum"], "budgeted optimum V(s₀, d)", va="center", fontsize=8.5)
    for name, label, dash in soft:
        axis.plot(curve["budget"], curve[f"soft_{name}"], color=GREY, lw=1.3, ls=dash)
        height = end[f"soft_{name}"] + {"never": -0.006, "rarely": 0.004, "on_average": 0.004}[name]
        axis.text(end["budget"] + 0.005, height, f"best soft λ: {label}", va="center", fontsize=8.5, color=GREY)
    rows = rows[(rows["budget"] != "all") & ~rows["method"].str.startswith("soft")]
    rows = rows[rows["variant"] == "sampled"]
    highlighted = {
        "cmdp-hinge-margin": ("o", BLUE),
        "cmdp-overshoot-margin": ("s", GREEN),
        "cmdp": ("D", RED),
        "gkd-grpo": ("^", ORANGE),
        "dual": ("v", PALETTE[4]),
        "worst-case": ("P", PALETTE[5]),
    }
    for method, part in rows.groupby("method", sort=False):
        marker, colour = highlighted.get(method, ("x", GREY))
        budgets = part["budget"].astype(float)
        reward = part["of_optimum"].to_numpy() * optimum.loc[budgets].to_numpy()
        kept = (part["csr"] >= 0.99).to_numpy()
        for keeps, face in ((True, colour), (False, "white")):
            chosen = kept == keeps
            if method in highlighted:
                axis.plot(budgets[chosen], reward[chosen], marker, color=colour, mfc=face, ms=6.5, zorder=3)
            else:
                axis.plot(budgets[chosen], reward[chosen], "x", color=GREY, ms=4)
        if method in highlighted:
            axis.plot([], [], marker, color=colour, mfc=colour, label=method)
    axis.plot([], [], "x", color=GREY, ms=4, label="others; grpo far above")
    axis.plot([], [], "o", color="black", mfc="white", label="hollow: over 1 % violate")
    top = float(curve["soft_on_average"].max()) + 0.03  # above it only grpo, which keeps no budget
    axis.set(xlabel="budget d (nats a trajectory)", ylabel="E[R]", xlim=(0, None), ylim=(None, top))
    axis.legend(fontsize=8, loc="lower right", frameon=True)
    sns.despine(figure)
    return figure


def average(results: Path) -> plt.Figure:
    """Section 4 (d): who meets the budget on average, and what that says about trajectories."""
    optimum = pd.read_csv(results / "optimum.csv")
    figure, axis = plt.subplots(figsize=(6.0, 3.0))
    for (budget, part), dash, colour in zip(
        optimum.groupby("budget"), ("-", "--", "-."), (BLUE, ORANGE, GREEN), strict=False
    ):
        share = np.sort(part["soft_on_average_violation"].to_numpy())
        trees = np.arange(len(share) + 1) / len(share)
        axis.step([0, *share, 1], [*trees, 1], where="post", ls=dash, color=colour, label=f"d = {budget:g} nats")
    axis.set(xlabel="trajectories over the budget, though E[C] ≤ d", xlim=(0, 1), ylim=(0, 1.01))
    axis.set_ylabel("trees with at most so many")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    sns.despine(figure)
    return figure


def _row_of_three(titles: dict[str, str], xlabel: str, ylabel: str) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """Three panels side by side over one vertical axis, by the keys of their titles."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.0), sharey=True)
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set_title(title, fontsize=9.5)
        axis.set(xlabel=xlabel)
    axes[0].set(ylabel=ylabel)
    return figure, dict(zip(titles, axes, strict=True))


def penalty(results: Path) -> plt.Figure:
    """Section 4 (a): the maximiser's violation against the penalty n, under its bound."""
    rows = pd.read_csv(results / "penalty_bound.csv")
    titles = {
        "any policy": "any policy, budget in total",
        "one parameter": "one-parameter student, budget in total",
        "per token": "any policy, budget per token",
    }
    figure, axes = _row_of_three(titles, "penalty n", "P(C > d)")
    for case, axis in axes.items():
        part = rows[rows["case"] == case].groupby("n")[["p", "bound"]].mean()
        axis.plot(part.index, part["bound"], color="black", ls="--", lw=1.2, label="bound $(1 - J_c) / (1 + n)$")
        axis.plot(part.index, part["p"], "o-", color=BLUE, ms=4, label="maximiser of J̃", clip_on=False)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set(xlim=(0, None))
        axis.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        axis.minorticks_off()
    axis.set(ylim=(0, 1.05 * rows.groupby(["case", "n"])["bound"].mean().max()))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(fontsize=8, frameon=False)
    sns.despine(figure)
    figure.tight_layout()
    return figure


def jump(results: Path) -> plt.Figure:
    """J~ along a line of policies, and the integral of the gradient that formula (c) gives."""
    line = pd.read_csv(results / "jump_line.csv")
    titles = {
        "exhausted": "the paper's, as read: R and λΦ jump",
        "overshoot": "overshoot: R jumps",
        "hinge": "hinge (ours): nothing does",
    }
    figure, axes = _row_of_three(titles, "from the teacher to the soft optimum", "J̃")
    for form, axis in axes.items():
        value = line[form].to_numpy()
        # break the line where it jumps: between neighbours that differ by far more than the formula says
        steep = np.abs(np.diff(value) - np.diff(line[f"{form}_integrated"])) > 2e-3
        broken = np.where(np.append(steep, False), np.nan, value)
        axis.plot(line["position"], broken, color=BLUE, lw=1.8, label="J̃")
        axis.plot(line["position"], line[f"{form}_integrated"], color=ORANGE, ls="--", lw=1.4, label="∫ formula (c)")
    axes["exhausted"].legend(fontsize=8, frameon=False)
    sns.despine(figure)
    figure.tight_layout()
    return figure


def exact_penalty(results: Path) -> plt.Figure:
    """How much the hinge's maximiser still gains by violating, and the price that says when it stops."""
    gains, found = pd.read_csv(results / "exact_penalty_gain.csv"), pd.read_csv(results / "exact_penalty.csv")
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4))
    for (budget, part), marker, colour in zip(gains.groupby("budget"), "os^", (BLUE, ORANGE, GREEN), strict=False):
        mean = part.groupby("lambda")["gain"].mean()
        axes[0].plot(mean.index, mean.clip(lower=1e-7), marker + "-", ms=4, color=colour, label=f"d = {budget:g}")
        part = found[(found["budget"] == budget) & found["resolved"]]
        axes[1].plot(part["greatest_price"], part["threshold"], marker, ms=4, color=colour, mfc="none")
    axes[0].set(xlabel="λ", ylabel="max J̃ − V(s₀, d)", xscale="log", yscale="log")
    axes[0].legend(fontsize=8, frameon=False)
    both = found.loc[found["resolved"], ["threshold", "greatest_price"]].to_numpy()
    limits = [both.min(), both.max()]
    axes[1].plot(limits, limits, color="black", lw=0.8)
    axes[1].set(
        xlabel="greatest price of a nat, max 1/η(s)", ylabel="least λ that is enough", xscale="log", yscale="log"
    )
    sns.despine(figure)
    figure.tight_layout()
    return figure


def example(results: Path) -> plt.Figure:
    """A small tree under two policies of equal mean cost; a branch is as wide as it is probable."""
    rows = pd.read_csv(results / "example.csv")
    budget = rows["budget"].iloc[0]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    vocab, depth = int(rows["token"].max()) + 1, int(rows["depth"].max()) + 1
    for axis, (policy, part) in zip(axes, rows.groupby("policy", sort=False), strict=True):
        height, reach = {0: 0.0}, {0: 1.0}
        mean = 0.0
        for row in part.itertuples():
            gap = vocab ** (depth - 1 - row.depth)
            end = height[row.state] - gap * (row.token - (vocab - 1) / 2)
            mass = reach[row.state] * row.probability
            over = row.spent > budget + 1e-9
            colour = RED if over else BLUE
            axis.plot(
                [row.depth, row.depth + 1],
                [height[row.state], end],
                color=colour,
                ls="--" if over else "-",
                lw=0.5 + 7 * mass,
                solid_capstyle="round",
                zorder=1,
            )
            if row.child >= 0:
                height[row.child], reach[row.child] = end, mass
            else:
                mean += mass * row.spent
                axis.plot(
                    row.depth + 1, end, "o", ms=8, color="black", mfc="black" if row.reward else "white", zorder=2
                )
                text = f"C = {row.spent:.2f}" + (" > d" if over else "")
                axis.text(row.depth + 1.1, end, text, va="center", fontsize=8.5, color=colour)
        for state, spent in part.groupby("state")["spent"].first().items():
            axis.text(
                part.loc[part["state"] == state, "depth"].iloc[0],
                height[state],
                f"{max(0.0, spent):.2f}",
                ha="center",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "0.5"},
                zorder=3,
            )
        ends = part[part["child"] < 0]
        mass = ends["state"].map(reach) * ends["probability"]
        reward, late = (mass * ends["reward"]).sum(), mass[ends["spent"] > budget + 1e-9].sum()
        name = {"budgeted": "budgeted optimum", "soft": "soft Lagrangian's optimum"}[policy]
        axis.set_title(f"{name}\nE[R] = {reward:.2f}, E[C] = {mean:.2f}, {late:.0%} over d = {budget:g}", fontsize=10)
        axis.set(xlim=(-0.25, depth + 0.85))
        axis.axis("off")
    figure.text(
        0.5,
        0.03,
        "boxes: nats spent once the token there is chosen; width: probability; filled end: R = 1; dashed: over budget",
        ha="center",
        fontsize=8.5,
    )
    return figure
