"""Figures come from results files alone, runs that were not made are left out, and the same files give the same
figures."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import NAMES, completions
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from cmdp.methods import METHODS as TRAINED
from cmdp.methods import TRL
from cmdp.storage import read_yaml, write_table
from replication import plots, tables
from replication.experiments import gather, rows

ROOT = Path(__file__).parents[2]
RUNS = tables.by_name(rows(ROOT / "experiments.yaml"))
STYLE = plots.looks(RUNS)
DRAWN = ("frontier", "paired", "sensitivity", "ablations", "capacity", "violation", "drift")
METHODS = [name for name, row in RUNS.items() if row.family == "method"]
AWARE = [name for name in METHODS if RUNS[name].method not in tables.BUDGET_FREE]
SWEPT = ("cmdp", "cmdp-adaptive")  # trained for other budgets, too
SOFT = "gkd-grpo-strong"
MEASURES = (
    *("accuracy", "csr", "accuracy_within", "validity", "cost", "kl_per_token", "entropy", "tokens", "lucky"),
    *("calibration_error", "diversity", "style_distance", "longer_accuracy", "longer_csr", "longer_validity"),
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def study() -> dict[str, pd.DataFrame]:
    """The study's tables of every run of experiments.yaml, with made-up numbers."""
    rng = np.random.default_rng(0)

    def spread(*names: str) -> dict:
        value, width = rng.uniform(0.6, 0.95), rng.uniform(0.01, 0.04)
        return dict(zip(names, (value, value - width, value + width), strict=True))

    summary, frontier = [], []
    for name, row in RUNS.items():
        for measure in MEASURES:
            values = spread("mean", "low", "high")
            if measure in ("cost", "kl_per_token"):
                values = {end: 4 * (value - 0.55) for end, value in values.items()}
            about = {"run": name, "family": row.family, "tuned": row.tuned, "start": row.start, "budget": 2.0}
            summary.append(about | {"measure": measure, **values, "seeds": 2})
    for budget, method in itertools.product((1, 2, 4), METHODS):
        if method == "teacher" or (budget != 2 and method in AWARE and method not in SWEPT):
            continue
        shares = {**spread("csr", "csr_low", "csr_high"), **spread("within", "within_low", "within_high")}
        about = {"method": method, "budget": budget, "trained_at": budget if method in AWARE else None}
        frontier.append(about | spread("accuracy", "accuracy_low", "accuracy_high") | shares)
    pairs = [(run, of) for of in (SOFT, "grpo", "gkd") for run in METHODS if run not in (of, "teacher")]
    changed = [("saute-constant", "cmdp"), *((n, row.tuned) for n, row in RUNS.items() if row.family == "ablation")]
    differences = {"paired": [], "ablations": []}
    for name, both in (("paired", pairs), ("ablations", changed)):
        for (run, of), measure in itertools.product(both, MEASURES[:4]):
            values = {end: (value - 0.75) / 4 for end, value in spread("difference", "low", "high").items()}
            differences[name].append({"run": run, "baseline": of, "measure": measure, **values, "seeds": 2})
    strength = [
        {"method": method, "lam": lam, "measure": measure, **spread("mean", "low", "high")}
        | {"seeds": 2, "near_best": int(0.1 <= lam <= 0.3)}
        for method in ("gkd-grpo", "cmdp", "cmdp-hinge")
        for lam in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
        for measure in MEASURES[:3]
    ]
    violation = []
    for run, (low, high) in itertools.product(METHODS, itertools.pairwise([0, 0.5, 1, 1.5, 2, np.inf])):
        values = {name: rng.random() for name in ("accuracy", "validity", "confidence", "entropy")}
        label = f"{low:g} to {high:g}" if high < np.inf else f"over {low:g}"
        violation.append({"run": run, "bin": label, "low": low, "high": high, "count": 100, **values})
    made = {"summary": summary, "frontier": frontier, **differences, "strength": strength, "violation": violation}
    return {name: pd.DataFrame(lines) for name, lines in made.items()}


def points(axes) -> dict[str, np.ndarray]:
    """Where the points of each run stand in a panel: (n, 2)."""
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}


# ---- style ----


def test_a_run_looks_like_its_method_and_runs_of_one_method_are_told_apart():
    assert set(plots.STYLES) == {"sft", *TRAINED, *TRL}
    looks = {name: (to_hex(STYLE[name].colour), str(STYLE[name].marker)) for name in METHODS}
    for place in (0, 1):  # by colour, and for the colour-blind by marker
        assert len({look[place] for look in looks.values()}) >= len(looks) - 1
    assert len(set(looks.values())) == len(looks)
    assert {STYLE[f"gkd-grpo-{name}"].method for name in ("weak", "medium", "strong")} == {"gkd-grpo"}
    assert looks["grpo"][0] == plots.STYLES["grpo"][0][0]
    assert STYLE["cmdp-k3"] == STYLE["cmdp"]  # at another setting
    assert STYLE["gkd-grpo-half"] == STYLE[SOFT]  # the run that it is tuned as
    assert {name for name in METHODS if STYLE[name].line == "--"} == set(AWARE)


def test_a_name_that_begins_like_a_method_is_drawn_by_its_row():
    from made_up import row

    found = plots.looks({"grpo-in-name": row("grpo-in-name", method="cmdp")})
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


# ---- the default experiment ----


@pytest.fixture
def default(tmp_path, monkeypatch) -> Path:
    """Results of four default runs, in a folder with the repository's parameter files."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    content = (ROOT / "experiments.yaml").read_text()
    (tmp_path / "experiments.yaml").write_text(content)
    kept = {key: row for key, row in rows(ROOT / "experiments.yaml", "default").items() if row.name in NAMES}
    monkeypatch.setattr(plots, "rows", lambda part=None: kept if part else rows(ROOT / "experiments.yaml"))
    results = tmp_path / "results"
    for row in kept.values():
        table = completions().query("run == @row.name").drop(columns="run").assign(decoding="sampled", truncated=0)
        write_table(table, row.folder(results / "runs") / "completions.csv")
    steps = pd.DataFrame({"step": range(1, 101), "task_reward": 0.5, "csr": 0.9, "cost/mean": 1.5})
    trained = [row.name for row in kept.values() if row.name != "sft"]
    write_table(pd.concat([steps.assign(run=run, seed=0) for run in trained]), results / "curves.csv")
    cost = pd.DataFrame({"position": range(1, 9), "mean": 1.0, "q10": 0.5, "q50": 0.9, "q90": 1.7})
    write_table(pd.concat([cost.assign(run=run, seed=0) for run in kept]), results / "positions.csv")
    return results


def test_every_default_figure_is_drawn_as_svg_and_png_and_byte_for_byte_again(default, tmp_path):
    for folder in ("once", "again"):
        plots.draw("default", default, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "once" / "default").iterdir())
    figures = ("frontier", "cost_by_position", "cost_distribution", "training")
    assert names == sorted(f"{name}.{kind}" for name in figures for kind in ("svg", "png"))
    for name in names:
        once, again = (tmp_path / folder / "default" / name for folder in ("once", "again"))
        assert once.read_bytes() == again.read_bytes(), name


def test_the_default_frontier_stands_where_the_completions_say(default):
    (axes,) = plots._default(default)["frontier"].axes
    table = gather("completions", plots.rows(part="default"), default / "runs").query("split == 'test'")
    found, means = points(axes), table.assign(csr=table["cost"] <= 2.0).groupby("run")[["csr", "correct"]].mean()
    assert set(found) == set(means.index)
    for run, (where,) in found.items():
        assert where == pytest.approx(means.loc[run].to_numpy(dtype=float))


def test_a_missing_table_of_the_default_experiment_is_one_clear_line(default, tmp_path):
    (default / "curves.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"curves\.csv is missing: run `python -m replication tables`"):
        plots.draw("default", default, tmp_path / "drawn")


def test_no_marker_of_a_training_curve_hides_another(default):
    curves = pd.read_csv(default / "curves.csv")
    figure = plots.training(curves, STYLE)  # all curves are equal
    places = [line.get_markevery() for line in figure.axes[0].lines]
    assert len(set(places)) == len(places) == curves["run"].nunique()


def test_costs_are_drawn_of_the_held_out_prompts(default):
    kept = plots.rows(part="default")
    sampled = gather("completions", kept, default / "runs").query("split == 'test'")
    axes = plots.cost_distribution(sampled, STYLE, 2.0).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in kept.values()]
    assert axes.get_xscale() == "log"


# ---- the study ----


@pytest.mark.slow
def test_every_figure_of_the_study_is_drawn_and_byte_for_byte_again(study, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, table in study.items():
        write_table(table, tmp_path / "study" / f"{name}.csv")
    shutil.copy(ROOT / "results" / "chosen.yaml", tmp_path)
    for folder in ("once", "again"):
        plots.draw("study", tmp_path, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "once" / "study").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in DRAWN for kind in ("svg", "png"))
    for name in names:
        once, again = (tmp_path / folder / "study" / name for folder in ("once", "again"))
        assert once.read_bytes() == again.read_bytes(), name


def test_a_missing_table_is_one_clear_line_and_leaves_the_figures_alone(study, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "drawn" / "study").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "chosen.yaml", tmp_path)
    for name in set(study) - {"strength"}:
        write_table(study[name], tmp_path / "study" / f"{name}.csv")
    with pytest.raises(FileNotFoundError, match=r"strength\.csv is missing: run `python -m replication tables`"):
        plots.draw("study", tmp_path, tmp_path / "drawn")
    assert [path.name for path in tmp_path.glob("drawn/**/*")] == ["study"]


def test_the_frontier_has_a_panel_a_budget_and_rims_what_was_trained_for_it(study):
    table = study["frontier"].set_index(["budget", "method"])
    panels = plots.frontier(study["frontier"], STYLE, 0.95).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["budget: 1 nat", "budget: 2 nats", "budget: 4 nats"]
    for axes, budget in zip(panels, (1, 2, 4), strict=True):
        found = points(axes)
        assert set(found) == set(table.loc[budget].index)
        for bars in axes.containers:
            row = table.loc[(budget, bars.get_label())]
            assert found[bars.get_label()][0] == pytest.approx([row["csr"], row["accuracy"]])
            assert (bars.lines[0].get_markeredgecolor() == "black") == (bars.get_label() in AWARE)
        soft = table.loc[budget].loc[["gkd-grpo-weak", "gkd-grpo-medium", SOFT], ["csr", "accuracy"]]
        assert any(np.array_equal(line.get_xydata(), soft.to_numpy()) for line in axes.lines)


def test_trls_own_grpo_does_not_hide_ours(study):
    """They coincide: one is an outline."""
    axes = plots.frontier(study["frontier"], STYLE, 0.95).axes[1]
    faces = {bars.get_label(): bars.lines[0].get_markerfacecolor() for bars in axes.containers}
    assert faces["trl-grpo"] == "none" != faces["grpo"]


def test_differences_are_those_to_the_best_soft_lagrangian_in_points(study):
    table = study["paired"].query("baseline == @SOFT")
    figure = plots.paired(study["paired"], STYLE, SOFT)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [run for run in STYLE if run in set(table["run"])]
    for axes, measure in zip(figure.axes, tables.COMPARED, strict=True):
        expected = 100 * table[table["measure"] == measure].set_index("run")["difference"]
        for run, (where,) in points(axes).items():
            assert where == pytest.approx([expected[run], names.index(run)])


def test_strengths_near_the_best_have_a_black_edge_and_every_strength_a_label(study):
    figure = plots.sensitivity(study["strength"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gkd-grpo", "cmdp", "cmdp-hinge"]
    axes = figure.axes[0]
    edges = {lam: line.get_markeredgecolor() for line, *_ in axes.containers for lam in line.get_xdata()}
    assert {lam for lam, edge in edges.items() if edge == "black"} == {0.1, 0.3}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.01", "0.03", "0.1", "0.3", "1", "3"]
    single = study["strength"].query("method != 'cmdp-hinge' or lam == 1.0")  # a single strength has no range
    assert [axes.get_title(loc="left") for axes in plots.sensitivity(single).axes] == ["gkd-grpo", "cmdp"]


def test_every_ablation_stands_below_its_method_and_says_what_it_sets(study):
    ablated = {name: row.tuned for name, row in RUNS.items() if row.family == "ablation"}
    table = study["ablations"].set_index(["run", "measure"])["difference"]
    figure = plots.ablations(study["ablations"], STYLE, RUNS)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(ablated) + 1 + len({*ablated.values()})
    assert labels.index(SOFT) < labels.index("cmdp") < labels.index("budget_form: per_token, budget: 0.1")
    for axes, measure in zip(figure.axes, ("csr", "accuracy_within"), strict=True):
        found = points(axes)
        assert set(found) == {*ablated, "saute-constant", *ablated.values()}
        where = [100 * table["cmdp-jsd", measure], labels.index("divergence: jsd")]
        assert found["cmdp-jsd"][0] == pytest.approx(where)
        assert found["cmdp"][0] == pytest.approx([0, labels.index("cmdp")])
    few = plots.ablations(study["ablations"].query("run != 'cmdp-jsd'"), STYLE, RUNS)
    labels = [label.get_text() for label in few.axes[0].get_yticklabels()]
    assert "divergence: jsd" not in labels
    assert "divergence: forward_kl" in labels


def test_capacities_come_with_the_default_student_of_the_same_method(study):
    accuracy, csr = plots.capacity(study["summary"], STYLE).axes
    runs = {row.tuned for row in RUNS.values() if row.family == "capacity"}
    for axes in (accuracy, csr):
        found = points(axes)
        assert set(found) == runs
        for where in found.values():
            assert where[:, 0] == pytest.approx([0.1, 0.3, 0.5, 1.0], rel=0.1)
        assert len({tuple(where[:, 0]) for where in found.values()}) == len(found)  # side by side
    summary = study["summary"].set_index(["run", "measure"])["mean"]
    assert points(csr)[SOFT][:, 1] == pytest.approx(
        [summary[f"gkd-grpo-{name}", "csr"] for name in ("tenth", "strong", "half", "equal")]
    )
    assert "the teacher" in accuracy.get_legend_handles_labels()[1]


def test_a_bin_of_few_completions_is_not_drawn_and_confidence_has_a_scale_of_its_own(study):
    table = study["violation"].assign(confidence=lambda table: 0.95 + 0.04 * table["confidence"])
    table.loc[(table["run"] == "grpo") & (table["low"] == 2), "count"] = plots.FEW - 1
    figure = plots.violation(table, STYLE, [*plots.TRACED, SOFT])
    for axes in figure.axes:
        found = points(axes)
        assert set(found) == {*plots.TRACED, SOFT}
        assert len(found["grpo"]) == 4
        assert len(found["gkd"]) == 5
        places = {round(where[0, 0], 6) for where in found.values()}
        assert len(places) == len(found)  # side by side
        assert [line.get_xdata()[0] for line in axes.lines if line.get_color() == "black"] == [1.5]  # C = d
    low, high = figure.axes[2].get_ylim()
    assert high - low < 0.06


def test_drift_shows_every_run_of_the_default_student_and_the_teacher(study):
    shown = [name for name, row in RUNS.items() if row.start in ("student", "teacher")]
    for axes in plots.drift(study["summary"], STYLE).axes:
        assert len(axes.containers) == len(shown)
        assert set(axes.get_legend_handles_labels()[1]) == set(METHODS)


def test_a_study_of_a_few_runs_is_drawn_from_the_tables_that_it_writes():
    """The tables as `write_study` computes them, long before every run was made."""
    few = ("sft", "grpo", "gkd-grpo-weak", SOFT, "cmdp")
    table = completions().query("run in @few")
    for run in ("cmdp-at-4", "cmdp-k3"):
        table = pd.concat([table, completions().query("run == 'cmdp'").assign(run=run)])
    chosen = read_yaml(ROOT / "results" / "chosen.yaml")["runs"]
    summary = tables.summary(table, RUNS, 0.5)
    figures = {
        "paired": plots.paired(tables.paired(table, [SOFT, "grpo"], METHODS, 0.5), STYLE, SOFT),
        "ablations": plots.ablations(tables.ablations(table, RUNS, 0.5), STYLE, RUNS),
        "sensitivity": plots.sensitivity(tables.strength(summary, RUNS, chosen, 0.05)),
        "capacity": plots.capacity(summary, STYLE),
        "frontier": plots.frontier(tables.frontier(table, RUNS, 0.5), STYLE, 0.95),
        "violation": plots.violation(tables.violation(table, METHODS, 0.5), STYLE, [*plots.TRACED, SOFT]),
        "drift": plots.drift(summary, STYLE),
    }
    assert tuple(sorted(figures)) == tuple(sorted(DRAWN))
    assert set(points(figures["paired"].axes[0])) == {*few} - {SOFT}
    assert set(points(figures["ablations"].axes[0])) == {"cmdp", "cmdp-k3"}
    assert not figures["capacity"].axes[0].containers
    shown = [set(points(axes)) for axes in figures["frontier"].axes]
    assert shown == [{*few}, {*few} - {"cmdp"}, {*few}]  # at 0.5, 1 and 4: of cmdp none was trained for 1


def test_figures_of_another_subject_are_refused():
    with pytest.raises(ValueError, match="There are figures of default, study, theory, not of 'studdy'"):
        plots.draw("studdy")
