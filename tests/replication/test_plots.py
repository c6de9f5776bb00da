"""Figures come from results files alone, runs that were not made are left out, and the same files give the same
figures."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_model
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from cmdp.methods import METHODS as TRAINED
from cmdp.methods import TRL
from cmdp.storage import read_yaml, write_table, write_text
from replication import plots, tables
from replication.experiments import rows

ROOT = Path(__file__).parents[2]
RUNS = tables.by_name(rows(ROOT / "experiments.yaml"))
METHODS = [name for name, row in RUNS.items() if row.family == "method" and row.start == "student"]
AWARE = [name for name in METHODS if RUNS[name].method not in tables.BUDGET_FREE]
ENTRIES = read_yaml(ROOT / "experiments.yaml")["tuning"]["entries"]
LAMBDAS = {name: ENTRIES[RUNS[name].tuned]["fixed"]["lam"] for name in METHODS if RUNS[name].method == plots.SOFT}
LAMBDAS = dict(sorted(LAMBDAS.items(), key=lambda item: item[1]))
STYLE = plots.looks(RUNS, LAMBDAS)
BUDGETS = (0.3, 0.5, 0.8)
FIGURES = {
    "default": ("ceiling", "frontier", "cost_by_position", "cost_distribution", "training"),
    "study": ("ceiling", "frontier", "equal_csr", "nats", "ablations", "capacity", "violation"),
}
COLUMNS = ("accuracy", "csr", "accuracy_within", "validity", "cost")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def spread(*names: str) -> dict:
    """A made-up share with its interval."""
    value, width = RNG.uniform(0.6, 0.95), RNG.uniform(0.01, 0.04)
    return dict(zip(names, (value, value - width, value + width), strict=True))


def lines(own: list[dict], *about: dict) -> pd.DataFrame:
    return pd.DataFrame([fields | more for fields, more in zip(own, itertools.cycle(about or ({},)), strict=False)])


@pytest.fixture(scope="module")
def made() -> dict[str, pd.DataFrame]:
    """The tables of every run of experiments.yaml, by path under results, with made-up numbers."""
    summary = [
        {"run": name, "family": row.family, "tuned": row.tuned, "start": row.start, "budget": 0.5, "measure": measure}
        | spread("mean", "low", "high")
        for (name, row), measure in itertools.product(RUNS.items(), COLUMNS)
    ]
    shown = [
        {"run": run, "method": method, "budget": RUNS[run].settings.get("budget", 0.5)}
        for run, method in tables.points(RUNS).items()
    ]
    free = [one | {"budget": budget} for one in shown for budget in BUDGETS if one["method"] not in AWARE]
    frontier = [
        one
        | {"trained_at": one["budget"] if one["method"] in AWARE else None}
        | spread("accuracy", "accuracy_low", "accuracy_high")
        | spread("csr", "csr_low", "csr_high")
        for one in (*(one for one in shown if one["method"] in AWARE), *free)
    ]
    places = itertools.cycle(("within", "stricter", "looser"))
    equal = [
        one | spread("difference", "low", "high") | {"csr": RNG.random(), "place": next(places)}
        for one in shown
        if one["method"] in AWARE
    ]
    changed = [
        ("saute-constant", "cmdp"),
        *((name, row.tuned) for name, row in RUNS.items() if row.family == "ablation"),
    ]
    ablations = [
        {"run": run, "baseline": of, "measure": measure} | spread("difference", "low", "high")
        for (run, of), measure in itertools.product(changed, COLUMNS[:4])
    ]
    violation = [
        {"run": run, "bin": f"{low:g} to {high:g}", "low": low, "high": high, "count": 100, "accuracy": RNG.random()}
        for run, (low, high) in itertools.product(METHODS, itertools.pairwise([0, 0.5, 1, 1.5, 2, np.inf]))
    ]
    prices = [{"budget": d, "ceiling": 0.5 + d / 9, "low": 0.4 + d / 9, "high": 0.6 + d / 9} for d in (0.05, 0.5, 3.0)]
    ceiling = [
        {"run": run, "budget": 0.5, "accuracy": 0.6, "cost": 0.4, "ceiling": 0.7, "useful": 0.3, "wasted": 0.1}
        for run in RUNS
    ]
    cost = [
        {"run": run, "seed": 0, "position": k, "mean": k / 9, "q10": k / 20, "q50": k / 10, "q90": k / 6}
        for run in METHODS[:5]
        for k in range(1, 6)
    ]
    curves = [
        {"run": run, "seed": 0, "step": k, "task_reward": 0.5, "csr": 0.9, "cost/mean": 1.5}
        for run in METHODS[1:5]
        for k in range(1, 101)
    ]
    found = {
        "study/summary": summary,
        "study/frontier": frontier,
        "study/equal_csr": equal,
        "study/ablations": ablations,
    }
    found |= {"study/violation": violation, "ceiling": ceiling, "positions": cost, "curves": curves}
    found["prices"] = [row | {"budgeted": row["ceiling"] - 0.05, "soft": row["ceiling"] - 0.1} for row in prices]
    return {name: pd.DataFrame(table) for name, table in found.items()}


@pytest.fixture(scope="module")
def sampled() -> pd.DataFrame:
    """Sampled completions of every run."""
    shape = {
        "seed": 0,
        "prompt": np.arange(60),
        "decoding": "sampled",
        "correct": 1,
        "valid": 1,
        "right": 0.9,
        "tokens": 5,
    }
    parts = [pd.DataFrame(shape).assign(run=run, cost=RNG.exponential(0.3, 60)) for run in RUNS]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(accurate=table["right"])


@pytest.fixture
def results(made, sampled, tmp_path, monkeypatch) -> Path:
    """A folder of results, read in the repository's own."""
    monkeypatch.chdir(ROOT)
    for name, table in made.items():
        write_table(table, tmp_path / f"{name}.csv")
    chosen = "".join(f"  {name}: {{lam: {lam}}}\n" for name, lam in LAMBDAS.items())
    write_text(f"runs:\n{chosen}", tmp_path / "chosen.yaml")
    monkeypatch.setattr(plots, "read_completions", lambda results, part: sampled)
    return tmp_path


def points(axes) -> dict[str, np.ndarray]:
    """Where the points of each labelled run stand in a panel: (n, 2)."""
    found = [(bars.get_label(), bars.lines[0].get_xydata()) for bars in axes.containers if hasattr(bars, "lines")]
    return {label: where for label, where in found if label and not label.startswith("_")}


# ---- style ----


def test_a_run_looks_like_its_method_and_runs_of_one_method_are_told_apart():
    assert set(plots.STYLES) == {"sft", *TRAINED, *TRL}
    looks = {name: (to_hex(STYLE[name].colour), str(STYLE[name].marker)) for name in METHODS}
    assert len({colour for colour, _ in looks.values()}) == len(looks)
    others = [marker for name, (_, marker) in looks.items() if name not in LAMBDAS]
    assert len(set(others)) == len(others)  # for the colour-blind
    assert len({looks[name][1] for name in LAMBDAS}) == 1  # shades of one hue, darker with lambda
    assert [sum(STYLE[name].colour) for name in LAMBDAS] == sorted(
        (sum(STYLE[n].colour) for n in LAMBDAS), reverse=True
    )
    for name, method in tables.points(RUNS).items():
        assert STYLE[name] == STYLE[method]  # at another budget
    assert STYLE["cmdp-chance-third"] == STYLE["cmdp-chance"]
    assert STYLE["cmdp-margin"] != STYLE["cmdp-hinge"]
    assert {name for name in METHODS if STYLE[name].line == "--"} == set(AWARE)


def test_a_name_that_begins_like_a_method_is_drawn_by_its_row():
    from made_up import row

    found = plots.looks({"grpo-in-name": row("grpo-in-name", method="cmdp")}, {})
    assert found["grpo-in-name"].colour == plots.STYLES["cmdp"][0][0]


def test_ticks_say_where_they_stand():
    """82.5 % was once printed as 82 %."""
    _, axes = plt.subplots()
    axes.set(xlim=(0.82, 0.88), ylim=(0.35, 6))
    plots._percent(axes.xaxis)
    for value in axes.get_xticks():
        assert float(axes.xaxis.get_major_formatter()(value, 0)) == pytest.approx(100 * value)
    axes.set_yscale("log")
    plots._logarithmic(axes.yaxis)
    shown = [axes.yaxis.get_major_formatter()(tick, 0) for tick in axes.get_yticks() if 0.35 <= tick <= 6]
    assert shown == ["0.5", "1", "2", "5"]  # and not 10^0 alone


# ---- files ----


@pytest.mark.slow
@pytest.mark.parametrize("subject", FIGURES)
def test_every_figure_is_drawn_as_svg_and_png_and_byte_for_byte_again(results, tmp_path, subject):
    for folder in ("once", "again"):
        plots.draw(subject, results, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "once" / subject).iterdir())
    assert names == sorted(f"{name}.{kind}" for name in FIGURES[subject] for kind in ("svg", "png"))
    for name in names:
        once, again = (tmp_path / folder / subject / name for folder in ("once", "again"))
        assert once.read_bytes() == again.read_bytes(), name


@pytest.mark.parametrize(("subject", "missing"), [("default", "curves"), ("study", "study/violation")])
def test_a_missing_table_is_one_clear_line_and_leaves_the_figures_alone(results, tmp_path, subject, missing):
    (results / f"{missing}.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"\.csv is missing: run `python -m replication tables`"):
        plots.draw(subject, results, tmp_path / "drawn")
    assert not list(tmp_path.glob("drawn/**/*.png"))


def test_figures_of_another_subject_are_refused():
    with pytest.raises(ValueError, match="There are figures of default, study, theory and laptop, not of 'studdy'"):
        plots.draw("studdy")


def test_the_laptops_figures_show_what_its_summary_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    drawn = plots.laptop_figures(Path("results"))
    assert tuple(drawn) == FIGURES["default"]
    mean = pd.read_csv("results/laptop-gpu/summary.csv").pivot(index="run", columns="measure", values="mean")
    found = points(drawn["frontier"].axes[0])
    for run in ("sft", "grpo", "gkd", "cmdp", "cmdp-chance"):
        assert found[run] == pytest.approx(mean.loc[[run], ["csr", "accuracy"]].to_numpy(), abs=1e-5)
    soft = mean.loc[["gkd-grpo-weak", "gkd-grpo-strong"], ["csr", "accuracy"]].to_numpy()  # two looks, one line
    lines = [line.get_xydata() for line in drawn["frontier"].axes[0].lines]
    assert any(line.shape == soft.shape and np.allclose(line, soft, atol=1e-5) for line in lines)
    runs, lambdas = tables.of_profile(Path("results/laptop-gpu"))[1:3]
    style = plots.looks(runs, lambdas)
    assert style["gkd-grpo-weak"].colour != style["gkd-grpo-strong"].colour
    assert tables.points(runs) == {run: run for run in runs}


# ---- what nats buy ----


def test_a_student_stands_at_the_nats_that_its_completions_keep(made, sampled):
    table = plots.kept(sampled, RUNS, 0.95)
    assert set(table["run"]) == set(tables.points(RUNS))  # the student's, at each budget, and no ablation
    for _, row in table.iterrows():
        assert (sampled[sampled["run"] == row["run"]]["cost"] <= row["nats"]).mean() == pytest.approx(0.95, abs=0.02)
    (axes,) = plots.ceiling(table, made["prices"], STYLE, 0.5, 0.95).axes
    found = points(axes)
    assert set(found) == set(plots.TRACED)
    assert len(found["cmdp-chance"]) == len(BUDGETS)  # joined
    assert len(found["grpo"]) == 1
    soft = table.set_index("run").loc[list(LAMBDAS), ["nats", "accuracy"]].to_numpy()
    assert any(np.array_equal(line.get_xydata(), soft) for line in axes.lines)
    for name in ("ceiling", "budgeted", "soft"):
        line = made["prices"][["budget", name]].to_numpy()
        assert sum(np.array_equal(drawn.get_xydata(), line) for drawn in axes.lines) == 1


def test_useful_and_wasted_nats_add_up_to_the_cost(made):
    (axes,) = plots.nats(made["ceiling"], STYLE, RUNS).axes
    useful, wasted = axes.containers
    assert [label.get_text() for label in axes.get_yticklabels()] == [run for run in STYLE if run in METHODS]
    for left, right in zip(useful, wasted, strict=True):
        assert left.get_width() == right.get_x() == 0.3
        assert right.get_x() + right.get_width() == pytest.approx(0.4)
    assert "60 % of at most 70 %" in axes.texts[0].get_text()


def test_a_cost_distribution_reads_as_the_csr_at_each_budget(sampled):
    (axes,) = plots.cost_distribution(sampled, STYLE, 0.5, 0.95).axes
    drawn = {line.get_label(): line for line in axes.lines}
    own = sampled[sampled["run"] == "cmdp"]["cost"]
    csr = np.interp(0.5, drawn["cmdp"].get_xdata(), drawn["cmdp"].get_ydata())
    assert csr == pytest.approx((own <= 0.5).mean(), abs=0.02)


def test_no_marker_of_a_training_curve_hides_another(made):
    figure = plots.training(made["curves"], STYLE)  # all curves are equal
    places = [line.get_markevery() for line in figure.axes[0].lines]
    assert len(set(places)) == len(places) == made["curves"]["run"].nunique()


# ---- comparisons ----


def test_the_frontier_has_a_panel_a_budget_and_rims_what_was_trained_for_it(made):
    table = made["study/frontier"].set_index(["budget", "method"])
    panels = plots.frontier(made["study/frontier"], STYLE, 0.95).axes
    assert [axes.get_title(loc="left") for axes in panels] == [f"budget: {budget} nats" for budget in BUDGETS]
    for axes, budget in zip(panels, BUDGETS, strict=True):
        found = points(axes)
        assert set(found) == set(table.loc[budget].index) - set(LAMBDAS)
        for bars in axes.containers:
            if (name := bars.get_label()) in found:
                assert found[name][0] == pytest.approx(table.loc[(budget, name), ["csr", "accuracy"]].tolist())
                assert (bars.lines[0].get_markeredgecolor() == "black") == (name in AWARE)
        soft = table.loc[budget].loc[list(LAMBDAS), ["csr", "accuracy"]]  # in the order of lambda
        assert any(np.array_equal(line.get_xydata(), soft.to_numpy()) for line in axes.lines)


def test_trls_own_grpo_does_not_hide_ours(made):
    """They coincide: one is an outline."""
    axes = plots.frontier(made["study/frontier"], STYLE, 0.95).axes[1]
    faces = {bars.get_label(): bars.lines[0].get_markerfacecolor() for bars in axes.containers}
    assert faces["trl-grpo"] == "none" != faces["grpo"]


def test_differences_at_equal_csr_stand_in_the_panel_of_their_budget(made):
    table = made["study/equal_csr"].set_index(["budget", "method"])
    figure = plots.equal_csr(made["study/equal_csr"], STYLE)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [run for run in STYLE if run in AWARE]
    for axes, budget in zip(figure.axes, BUDGETS, strict=True):
        found = points(axes)
        assert set(found) == set(table.loc[budget].index)
        for bars in axes.containers:
            row, method = table.loc[(budget, bars.get_label())], bars.get_label()
            assert found[method][0] == pytest.approx([100 * row["difference"], names.index(method)])
            assert (bars.lines[0].get_markerfacecolor() == "white") == (row["place"] == "stricter")
        assert sorted(text.get_text() for text in axes.texts) == sorted(
            f"{100 * csr:.0f} %" for csr in table.loc[budget]["csr"]
        )


def test_every_ablation_stands_below_its_method_and_says_what_it_sets(made):
    ablated = {name: row.tuned for name, row in RUNS.items() if row.family == "ablation"}
    table = made["study/ablations"].set_index(["run", "measure"])["difference"]
    figure = plots.ablations(made["study/ablations"], STYLE, RUNS)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(ablated) + 1 + len({*ablated.values()})
    assert labels.index("cmdp-chance") < labels.index("csr_target: 0.95")
    for axes, measure in zip(figure.axes, ("accuracy", "csr"), strict=True):
        found = points(axes)
        assert set(found) == {*ablated, "saute-constant", *ablated.values()}
        where = [100 * table["chance-forward-kl", measure], labels.index("divergence: forward_kl")]
        assert found["chance-forward-kl"][0] == pytest.approx(where)
        assert found["cmdp"][0] == pytest.approx([0, labels.index("cmdp")])
    few = plots.ablations(made["study/ablations"].query("run != 'chance-forward-kl'"), STYLE, RUNS)
    assert "divergence: forward_kl" not in [label.get_text() for label in few.axes[0].get_yticklabels()]


def test_each_student_has_a_panel_with_the_same_methods(made):
    summary = made["study/summary"].set_index(["run", "measure"])["mean"]
    panels = plots.capacity(made["study/summary"], STYLE, RUNS, 0.95).axes
    assert [axes.get_title(loc="left") for axes in panels] == list(plots.TEXTS["capacity"]["starts"].values())
    for axes, end in zip(panels, ("-third", "", "-equal"), strict=True):
        found = points(axes)
        assert set(found) == {"sft", "grpo", "gkd", "cmdp-chance"}
        for method, (where,) in found.items():
            assert where == pytest.approx([summary[method + end, "csr"], summary[method + end, "accuracy"]])
        soft = [name + end for name in LAMBDAS if name + "-third" in RUNS]
        soft = [[summary[name, measure] for measure in ("csr", "accuracy")] for name in soft]
        assert any(np.array_equal(line.get_xydata(), soft) for line in axes.lines)


def test_a_bin_of_few_completions_has_no_accuracy(made):
    table = made["study/violation"].copy()
    table.loc[(table["run"] == "grpo") & (table["low"] == 2), "count"] = plots.FEW - 1
    accuracy, share = plots.violation(table, STYLE).axes
    for axes, bins in ((accuracy, 4), (share, 5)):
        found = points(axes)
        assert set(found) == {*plots.TRACED}
        assert (len(found["grpo"]), len(found["gkd"])) == (bins, 5)
        assert len({round(where[0, 0], 6) for where in found.values()}) == len(found)  # side by side
        assert [line.get_xdata()[0] for line in axes.lines if line.get_color() == "black"] == [1.5]  # C = d
    assert points(share)["gkd"][:, 1].sum() == pytest.approx(1)


def test_a_study_of_a_few_runs_is_drawn(made):
    few = {"sft", "grpo", [*LAMBDAS][2], "cmdp"}
    frontier, summary, violation = (made[f"study/{name}"] for name in ("frontier", "summary", "violation"))
    shown = plots.frontier(frontier[frontier["method"].isin(few)], STYLE, 0.95)
    assert set(points(shown.axes[1])) == {"sft", "grpo", "cmdp"}
    shown = plots.violation(violation[violation["run"].isin(few)], STYLE)
    assert set(points(shown.axes[0])) == {"sft", "grpo", "cmdp"}
    assert len(plots.capacity(summary[summary["run"].isin(few)], STYLE, RUNS, 0.95).axes) == 1


def test_a_ledger_spends_the_budget(tokenizer):
    models = make_model(tokenizer, seed=0, spread=2.0), make_model(tokenizer, seed=1, hidden=24, spread=2.0)
    table = plots.ledger(*models, tokenizer, {"prompt": "a b c"}, 0.1, 12, seed=3)
    assert table["remaining"].to_list() == pytest.approx((0.1 - table["cost"].cumsum()).to_list(), abs=1e-5)
    assert (table["remaining"] < 0).any(), "this budget is exceeded"
    assert plots.token_ledger(table, 0.1).axes
