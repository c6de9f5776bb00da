"""Figures of the theory study, each drawn from its result files alone; colour is never the only mark."""

from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt

from cmdp.storage import whole
from replication.plots import PALETTE, save
from replication.theory import OURS

NO_BOX = {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, GREY = *PALETTE[:6], (0.45, 0.45, 0.45)
BY_BUDGET = tuple(zip("os^", ("-", "--", ":"), (BLUE, ORANGE, GREEN), strict=True))  # marker, dash, colour


def draw_all(results: Path, folder: Path) -> None:
    """Draw every figure into `folder`, which is replaced as a whole."""
    with whole(folder) as made, sns.axes_style("ticks", NO_BOX), sns.plotting_context("paper", font_scale=1.1):
        for draw in (learners, frontier, average, penalty, jump, exact_penalty, example):
            save(draw(results), made, draw.__name__)


def learners(results: Path) -> plt.Figure:
    """Each method: reward against the exact optimum, and how often it violates."""
    kept = "budget == 'all' and method not in ['soft optimum, rarely', 'soft optimum, on average']"
    rows = pd.read_csv(results / "against_optimum.csv").query(kept)
    rows = rows.assign(over=1 - rows["csr"], over_low=1 - rows["csr_high"], over_high=1 - rows["csr_low"])
    place = rows.groupby("method")["of_optimum"].mean().rank()
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 5.4), sharey=True, layout="constrained")
    for variant, shift, style in (
        ("exact gradient", 0.24, {"fmt": "o", "color": BLUE, "ms": 4.2}),
        ("sampled", 0.0, {"fmt": "s", "color": ORANGE, "ms": 4.2, "mfc": "white"}),
        ("from the teacher", -0.24, {"fmt": "^", "color": GREEN, "ms": 4.2, "mfc": "white"}),
        ("closed form", 0.0, {"fmt": "*", "color": "black", "ms": 8}),
    ):
        part = rows[rows["variant"] == variant]
        for axis, name in zip(axes, ("of_optimum", "over"), strict=True):
            reach = np.abs([part[f"{name}_{end}"] - part[name] for end in ("low", "high")])
            axis.errorbar(part[name], place[part["method"]] + shift, xerr=reach, label=variant, zorder=3, **style)
    edge = 1.36
    for method, part in rows[rows["of_optimum"] > edge].groupby("method")["of_optimum"]:
        axes[0].text(edge, place[method] + 0.5, f"{part.min():.0%} to {part.max():.0%} →", ha="right", fontsize=8)
    axes[0].xaxis.set_major_formatter("{x:.0%}")
    axes[0].set(xlabel="reward / budgeted optimum", xlim=(0.3, edge), ylim=(0.4, len(place) + 0.8))
    names = {name: f"{name} (ours)" for name in OURS} | {"soft optimum, never": "best soft λ, no violation"}
    axes[0].set_yticks(place, [names.get(name, name) for name in place.index])
    axes[1].set_xscale("symlog", linthresh=0.01)
    axes[1].set_xticks([0, 0.005, 0.01, 0.1, 1], ["0", "0.5%", "1%", "10%", "100%"])
    axes[1].set(xlabel="trajectories over the budget", xlim=(-0.0008, 1.4))
    for axis, at, text in zip(axes, (1, 0.01), ("exact optimum", "allowed in tuning"), strict=True):
        axis.axvline(at, color="black", lw=1, ls=":")
        axis.annotate(text, (at, 0.7), (3, 0), textcoords="offset points", rotation=90, fontsize=8)
        axis.grid(axis="y", lw=0.4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def frontier(results: Path) -> plt.Figure:
    """V(s_0, d), the soft Lagrangian's frontiers, and every sampled learner, to the right of its budget."""
    curve, rows = (pd.read_csv(results / f"{name}.csv") for name in ("frontier", "against_optimum"))
    optimum = pd.read_csv(results / "optimum.csv").groupby("budget")["lower"].mean()
    last = curve["budget"].iloc[-1] + 0.005
    figure, axis = plt.subplots(figsize=(7.8, 4.8))
    for name, label, colour, dash, width in (
        ("optimum", "budgeted optimum V(s₀, d)", "black", "-", 2),
        ("soft_never", "best soft λ: never violates", GREY, "-", 1.3),
        ("soft_rarely", "best soft λ: violates ≤ 5 %", GREY, "--", 1.3),
        ("soft_on_average", "best soft λ: E[C] ≤ d", GREY, ":", 1.3),
    ):
        axis.plot(curve["budget"], curve[name], color=colour, ls=dash, lw=width)
        axis.annotate(label, (last, curve[name].iloc[-1]), va="center", fontsize=8.5, color=colour)
    rows = rows[(rows["budget"] != "all") & (rows["variant"] == "sampled")].astype({"budget": float})
    shown = ("cmdp-hinge-margin", "cmdp-overshoot-margin", "dual", "worst-case", "gkd-grpo", "cmdp")
    labels = *shown, "others (grpo is far above)"
    looks = zip(labels, "osvP^Dx", (BLUE, GREEN, PURPLE, BROWN, ORANGE, RED, GREY), strict=True)
    drawn = rows["method"].where(rows["method"].isin(shown), labels[-1])
    for column, (label, marker, colour) in enumerate(looks):
        part = rows[drawn == label]
        at, reward = part["budget"] + 0.008 * column, part["of_optimum"] * part["budget"].map(optimum)
        kept = part["csr"] >= 0.99
        style = {"color": colour, "ls": "", "marker": marker, "ms": 6 if label in shown else 4}
        axis.plot(at[kept], reward[kept], label=label, **style)
        axis.plot(at[~kept], reward[~kept], mfc="white", **style)
    for budget in optimum.index:
        axis.axvspan(budget, budget + 0.054, color="0.95", zorder=0)
    axis.plot([], [], "o", color="black", mfc="white", label="hollow: over 1 % violate")
    axis.set(xlabel="budget d (nats per trajectory); a band holds the learners of the d at its left edge")
    axis.set(ylabel="E[R]", xlim=(0, None), ylim=(None, curve["soft_on_average"].max() + 0.03))  # only grpo is above
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.25, 0))
    return figure


def average(results: Path) -> plt.Figure:
    """Section 4 (d): the share of trajectories over a budget that is met on average."""
    figure, axis = plt.subplots(figsize=(6.0, 3.0))
    groups = pd.read_csv(results / "optimum.csv").groupby("budget")["soft_on_average_violation"]
    for (budget, share), (_, dash, colour) in zip(groups, BY_BUDGET, strict=False):
        axis.ecdf(share, ls=dash, color=colour, lw=1.6, label=f"d = {budget:g} nats")
    axis.set(xlabel="trajectories over the budget, although E[C] ≤ d", ylabel="trees (cumulative)", xlim=(0, None))
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.yaxis.set_major_formatter("{x:.0%}")
    return figure


def _three(titles: dict[str, str], xlabel: str, ylabel: str) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """Three panels over one vertical axis, by the keys of their titles."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.0), sharey=True, layout="constrained")
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set_title(title, fontsize=9.5)
    axes[0].set(ylabel=ylabel)
    figure.supxlabel(xlabel, fontsize=10.5)
    return figure, dict(zip(titles, axes, strict=True))


def penalty(results: Path) -> plt.Figure:
    """Section 4 (a): the maximiser's violation against the penalty n, under its bound."""
    mean = pd.read_csv(results / "penalty_bound.csv").groupby(["case", "n"])[["p", "bound"]].mean()
    titles = {"any policy": "any policy, total budget", "one parameter": "one-parameter student, total budget"}
    titles["per token"] = "any policy, budget per token"
    figure, axes = _three(titles, "penalty n (axis: log(1 + n))", "P(C > d)")
    for case, axis in axes.items():
        part = mean.loc[case]
        axis.plot(part["bound"], color="black", ls="--", lw=1.2, label="bound $(1 - J_c) / (1 + n)$")
        axis.plot(part["p"], "o-", color=BLUE, ms=4, label=r"maximiser of $\tilde{J}$", clip_on=False, zorder=3)
        axis.set_xscale("function", functions=(np.log1p, np.expm1))
        axis.set_xticks([0, 1, 3, 10, 30, 100])
        axis.set(xlim=(0, None), ylim=(0, 1.05 * mean["bound"].max()))
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend(fontsize=8, frameon=False)
    return figure


def jump(results: Path) -> plt.Figure:
    """J~ along a line of policies, and the integral of the gradient that formula (c) gives."""
    line = pd.read_csv(results / "jump_line.csv", index_col="position")
    titles = {"exhausted": "exhausted (section 3): R and λΦ jump", "overshoot": "overshoot: R jumps"}
    titles["hinge"] = "hinge: nothing jumps"
    figure, axes = _three(titles, "position on the line from the teacher (0) to the soft optimum (1)", r"$\tilde{J}$")
    for form, axis in axes.items():
        # break the line where neighbours differ by far more than the formula says
        steep = (line[form].diff() - line[f"{form}_integrated"].diff()).abs().shift(-1) > 2e-3
        axis.plot(line[form].mask(steep), color=BLUE, lw=3.5, alpha=0.55, label=r"$\tilde{J}$")
        axis.plot(line[f"{form}_integrated"], color="black", ls="--", lw=1, label="∫ formula (c)")
    axes["exhausted"].legend(fontsize=8, frameon=False)
    return figure


def exact_penalty(results: Path) -> plt.Figure:
    """How much the hinge's maximiser still gains by violating, and the price that predicts when it stops."""
    gains, found = (pd.read_csv(results / f"exact_penalty{part}.csv") for part in ("_gain", ""))
    mean, found = gains.groupby(["budget", "lambda"])["gain"].mean(), found[found["resolved"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    for budget, (marker, dash, colour) in zip(mean.index.unique("budget"), BY_BUDGET, strict=False):
        positive, part = mean[budget][mean[budget] > 1e-9], found[found["budget"] == budget]
        left.plot(positive, marker, ls=dash, ms=4, color=colour, label=f"d = {budget:g}")
        right.plot(part["greatest_price"], part["threshold"], marker, ms=4, color=colour, mfc="none")
    right.axline((1, 1), (10, 10), color="black", lw=0.8, label="equal")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.legend(fontsize=8, frameon=False)
    left.set(xlabel="λ", ylabel=r"max $\tilde{J}$ − V(s₀, d)  (zeros not drawn)")
    ticks = {"xticks": [1, 3, 10, 30], "yticks": [1, 3, 10, 30]}
    right.set(xlabel="greatest price of a nat, max 1/η(s)", ylabel="least sufficient λ", **ticks)
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
    return figure


def example(results: Path) -> plt.Figure:
    """A small tree under two policies of equal mean cost; a branch is as wide as it is probable."""
    rows = pd.read_csv(results / "example.csv")
    budget, vocab, depth = rows["budget"].iloc[0], rows["token"].max() + 1, rows["depth"].max() + 1
    titles = {"budgeted": "budgeted optimum", "soft": "soft Lagrangian's optimum"}
    box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": "0.5"}
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    for axis, (policy, part) in zip(axes, rows.groupby("policy", sort=False), strict=True):
        height, reach, mean = {0: 0.0}, {0: 1.0}, np.zeros(3)  # mean: of R, C and 1{C > d}
        for row in part.itertuples():
            start, over = height[row.state], row.spent > budget + 1e-9
            end = start - vocab ** (depth - 1 - row.depth) * (row.token - (vocab - 1) / 2)
            mass, colour = reach[row.state] * row.probability, RED if over else BLUE
            axis.plot([row.depth, row.depth + 1], [start, end], color=colour, lw=0.5 + 7 * mass, zorder=1)
            text = f"{max(0.0, row.spent):.2f}"
            axis.text(row.depth, start, text, ha="center", va="center", fontsize=8, bbox=box, zorder=3)
            height[row.child], reach[row.child] = end, mass
            if row.child < 0:
                mean += mass * np.array([row.reward, row.spent, over])
                axis.plot(row.depth + 1, end, "o", ms=8, color="black", mfc="black" if row.reward else "white")
                text = f"C = {text}" + (" > d" if over else "")
                axis.text(row.depth + 1.1, end, text, va="center", fontsize=8.5, color=colour)
        numbers = f"E[R] = {mean[0]:.2f}, E[C] = {mean[1]:.2f}, {mean[2]:.0%} over d = {budget:g}"
        axis.set_title(f"{titles[policy]}\n{numbers}", fontsize=10)
        axis.set(xlim=(-0.25, depth + 0.85))
        axis.axis("off")
    note = "box: nats spent up to and including that state; width: probability; filled end: R = 1; red: over the budget"
    figure.text(0.5, 0.03, note, ha="center", fontsize=8.5)
    return figure
