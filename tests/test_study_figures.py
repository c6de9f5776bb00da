"""Figures and notebooks of the study: from its tables alone, arms that were not run left out, the same files again."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib import pyplot as plt

from cmdp.storage import write_table
from replication import run as arms
from replication import study_plots as figures
from replication import tables
from replication.plots import family

ROOT = Path(__file__).parents[1]
ARMS = yaml.safe_load((ROOT / "study" / "params.yaml").read_text())["arms"]
DRAWN = ("frontier", "paired", "sensitivity", "ablations", "capacity", "violation", "drift")
METHODS = [arm for arm, settings in ARMS.items() if settings["family"] == "method"]
AWARE = ("cmdp", "cmdp-overshoot", "cmdp-hinge", "cmdp-adaptive", "dual", "saute-constant", "worst-case")
SWEPT = ("cmdp", "cmdp-adaptive")  # trained for other budgets, too
MEASURES = (
    *("accuracy", "csr", "accuracy_within", "validity", "cost", "kl_per_token", "entropy", "tokens", "lucky"),
    *("calibration_error", "diversity", "style_distance", "longer_accuracy", "longer_csr", "longer_validity"),
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def results(tmp_path):
    write_tables(tmp_path / "results" / "study")
    return tmp_path / "results" / "study"


def write_tables(folder: Path) -> None:
    """Tables of every arm of study/params.yaml, with made-up numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def spread(*names: str) -> dict:
        value, width = rng.uniform(0.6, 0.95), rng.uniform(0.01, 0.04)
        return dict(zip(names, (value, value - width, value + width), strict=True))

    def write(name: str, rows: list[dict]) -> None:
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)

    common = {"seeds": 2}
    summary = []
    for arm, settings in ARMS.items():
        keys = {"arm": arm, "family": settings["family"], "run": settings["run"], "start": settings["start"]}
        for measure in MEASURES:
            values = spread("mean", "low", "high")
            if measure in ("cost", "kl_per_token"):
                values = {name: 4 * (value - 0.55) for name, value in values.items()}
            summary.append({**keys, "budget": 2.0, "measure": measure, **values, **common})
    write("summary", summary)
    frontier = []
    for budget in (1, 2, 4):
        for method in METHODS:
            if method == "teacher" or (budget != 2 and method in AWARE and method not in SWEPT):
                continue
            shares = {**spread("csr", "csr_low", "csr_high"), **spread("within", "within_low", "within_high")}
            accuracy = spread("accuracy", "accuracy_low", "accuracy_high")
            trained_at = budget if method in AWARE else None
            frontier.append({"method": method, "budget": budget, "trained_at": trained_at, **accuracy, **shares})
    write("frontier", frontier)
    rivals = ("gkd-grpo-strong", "grpo", "gkd")
    pairs = [(arm, rival) for rival in rivals for arm in METHODS if arm not in (rival, "teacher")]
    changed = [(arm, about["run"]) for arm, about in ARMS.items() if about["family"] == "ablation"]
    for name, both in (("paired", pairs), ("ablations", [("saute-constant", "cmdp"), *changed])):
        rows = []
        for arm, rival in both:
            for measure in MEASURES[:4]:
                values = {name: (value - 0.75) / 4 for name, value in spread("difference", "low", "high").items()}
                rows.append({"arm": arm, "rival": rival, "measure": measure, **values, **common})
        write(name, rows)
    write(
        "wins", [{"arm": a, "rival": b, **spread("win_rate", "low", "high"), "ties": 0.8, **common} for a, b in pairs]
    )
    strength = []
    for method in ("gkd-grpo", "cmdp", "cmdp-hinge"):
        for lam in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
            for measure in MEASURES[:3]:
                near = int(0.1 <= lam <= 0.3)
                row = {"method": method, "lam": lam, "measure": measure, **spread("mean", "low", "high")}
                strength.append({**row, **common, "near_best": near})
    write("strength", strength)
    ends = {"low": 0.001, "high": 0.002, "tried_low": 0.001, "tried_high": 0.003, "near_best": 2, "trials": 5}
    write("ranges", [{"method": method, "parameter": "learning_rate", "best": 0.002, **ends} for method in METHODS])
    edges = [0, 0.5, 1, 1.5, 2, np.inf]
    violation = []
    for method in METHODS:
        for low, high in itertools.pairwise(edges):
            values = {name: rng.random() for name in ("accuracy", "validity", "confidence", "entropy")}
            label = f"{low:g} to {high:g}" if high < np.inf else f"over {low:g}"
            violation.append({"method": method, "bin": label, "low": low, "high": high, "count": 100, **values})
    write("violation", violation)
    verdict = {"published": "+12.3 points", "verdict": "inconclusive", "evidence": "so [a, b]", "conditions": "small"}
    write("claims", [{"id": f"C{number}", "claim": "higher CSR", **verdict} for number in range(1, 10)])
    write("timing", [{"arm": arm, **spread("seconds", "low", "high"), "ratio_to_gkd_grpo": 1.1} for arm in METHODS])


def keep(results: Path, name: str, query: str) -> pd.DataFrame:
    """Leave of a table what the query finds, as if the rest had not been run."""
    table = pd.read_csv(results / f"{name}.csv").query(query)
    table.to_csv(results / f"{name}.csv", index=False)
    return table


def points(axes) -> dict[str, np.ndarray]:
    """Where the points of each run stand in a panel: (n, 2)."""
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}


@pytest.mark.slow
def test_every_figure_is_drawn_as_svg_and_png_and_byte_for_byte_again(results, tmp_path):
    for folder in ("once", "again"):
        figures.draw_all(results, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in DRAWN for kind in ("svg", "png"))
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_frontier_has_a_panel_a_budget_and_rims_what_was_trained_for_it(results):
    table = pd.read_csv(results / "frontier.csv").set_index(["budget", "method"])
    panels = figures.frontier(results).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["budget: 1 nat", "budget: 2 nats", "budget: 4 nats"]
    for axes, budget in zip(panels, (1, 2, 4), strict=True):
        found = points(axes)
        assert set(found) == set(table.loc[budget].index)
        for bars in axes.containers:
            row = table.loc[(budget, bars.get_label())]
            assert found[bars.get_label()][0] == pytest.approx([row["csr"], row["accuracy"]])
            aware = family(bars.get_label()) in AWARE
            assert bars.lines[0].get_markeredgecolor() == ("black" if aware else "white")
        soft = table.loc[budget].loc[["gkd-grpo-weak", "gkd-grpo-medium", "gkd-grpo-strong"], ["csr", "accuracy"]]
        assert any(np.array_equal(line.get_xydata(), soft.to_numpy()) for line in axes.lines)


def test_differences_are_those_to_the_best_soft_lagrangian_in_points(results):
    table = pd.read_csv(results / "paired.csv").query("rival == 'gkd-grpo-strong'")
    figure = figures.paired(results)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == figures._ordered(table["arm"].unique())
    for axes, measure in zip(figure.axes, figures.MEASURES, strict=True):
        expected = 100 * table[table["measure"] == measure].set_index("arm")["difference"]
        for arm, (where,) in points(axes).items():
            assert where == pytest.approx([expected[arm], names.index(arm)])


def test_what_is_near_the_best_is_shaded_half_way_to_its_neighbours(results):
    figure = figures.sensitivity(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gkd-grpo", "cmdp", "cmdp-hinge"]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in figure.axes[0].patches]
    assert spans == [pytest.approx((0.03**0.5 * 0.1**0.5, 0.03**0.5)), pytest.approx((0.03**0.5, 0.3**0.5))]
    assert figures._near_best(np.array([0.1]), np.array([True])) == []  # a single strength has no range


def test_every_ablation_stands_below_its_method_and_says_what_it_changes(results):
    ablated = {arm: about["run"] for arm, about in ARMS.items() if about["family"] == "ablation"}
    assert set(figures.ABLATIONS) == {*ablated, "saute-constant"}
    table = pd.read_csv(results / "ablations.csv").set_index(["arm", "measure"])["difference"]
    figure = figures.ablations(results)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(figures.ABLATIONS) + len({*ablated.values()})
    assert labels.index("gkd-grpo-strong") < labels.index("cmdp") < labels.index("budget per token")
    for axes, measure in zip(figure.axes, ("csr", "accuracy_within"), strict=True):
        found = points(axes)
        assert set(found) == {*figures.ABLATIONS, *ablated.values()}
        where = [100 * table["cmdp-jsd", measure], labels.index("cost: Jensen-Shannon")]
        assert found["cmdp-jsd"][0] == pytest.approx(where)
        assert found["cmdp"][0] == pytest.approx([0, labels.index("cmdp")])
    keep(results, "ablations", "arm != 'cmdp-jsd'")
    labels = [label.get_text() for label in figures.ablations(results).axes[0].get_yticklabels()]
    assert "cost: Jensen-Shannon" not in labels
    assert "cost: forward KL" in labels


def test_capacities_come_with_the_default_student_of_the_same_method(results):
    accuracy, csr = figures.capacity(results).axes
    runs = {about["run"] for about in ARMS.values() if about["family"] == "capacity"}
    for axes in (accuracy, csr):
        found = points(axes)
        assert set(found) == runs
        for where in found.values():
            assert where[:, 0] == pytest.approx([0.1, 0.3, 0.5, 1.0], rel=0.06)
    summary = pd.read_csv(results / "summary.csv").set_index(["arm", "measure"])["mean"]
    assert points(csr)["gkd-grpo-strong"][:, 1] == pytest.approx(
        [summary[f"gkd-grpo-{name}", "csr"] for name in ("tenth", "strong", "half", "equal")]
    )
    assert "the teacher" in accuracy.get_legend_handles_labels()[1]


def test_a_bin_of_few_completions_is_not_drawn(results):
    table = pd.read_csv(results / "violation.csv")
    table.loc[(table["method"] == "grpo") & (table["low"] == 2), "count"] = figures.FEW - 1
    table.to_csv(results / "violation.csv", index=False)
    for axes in figures.violation(results).axes:
        found = points(axes)
        assert set(found) == {*figures.TRACED, "gkd-grpo-strong"}
        assert len(found["grpo"]) == 4
        assert len(found["gkd"]) == 5
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [1.5]  # C = d


def test_drift_shows_every_arm_of_the_default_student_and_the_teacher(results):
    shown = [arm for arm, about in ARMS.items() if about["start"] in ("student", "teacher")]
    for axes in figures.drift(results).axes:
        assert len(axes.containers) == len(shown)
        assert set(axes.get_legend_handles_labels()[1]) == set(METHODS)


def test_a_missing_table_is_one_clear_line_and_leaves_the_figures_alone(results, tmp_path):
    (tmp_path / "drawn").mkdir()
    (results / "strength.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"strength\.csv is missing: `make study` writes"):
        figures.draw_all(results, tmp_path / "drawn")
    assert not list((tmp_path / "drawn").iterdir())


def test_a_study_of_a_few_arms_is_drawn_from_the_tables_that_it_writes(tmp_path):
    """The tables as `cmdp study` writes them, long before every arm was trained."""
    rng, size = np.random.default_rng(0), 64
    few = ("sft", "grpo", "gkd-grpo-weak", "gkd-grpo-strong", "cmdp", "cmdp-at-4", "cmdp-k3")
    columns = {name: rng.integers(0, 2, (len(few), size)) for name in ("correct", "valid")}
    columns |= {name: rng.random((len(few), size)) for name in ("entropy", "cost", "peak", "confidence")}
    completions = pd.concat(
        pd.DataFrame({name: values[place] for name, values in columns.items()}).assign(
            arm=arm,
            seed=np.arange(size) % 2,
            prompt=np.arange(size) // 16,
            split=np.where(np.arange(size) % 16 < 12, "test", "longer"),
            tokens=8,
            style="eq gives",
        )
        for place, arm in enumerate(few)
    )[["arm", *arms.COLUMNS]]
    params = {"budget": {"budget": 0.5}, "best": {"soft": "gkd-grpo-strong"}, "runs": {"cmdp": {"lam": 1.0}}}
    times = pd.DataFrame({"arm": few, "seed": 0, "steps": 2, "seconds": 1.0})
    trials = pd.DataFrame({"run": ["cmdp"] * 2, "learning_rate": [1e-3, 2e-3], "accuracy_within": [0.5, 0.6]})
    tables.write_all(completions, times, trials, params, {"arms": ARMS, "claims": {"near": 0.05}}, tmp_path / "study")
    drawn = {name: getattr(figures, name)(tmp_path / "study") for name in DRAWN}
    assert set(points(drawn["paired"].axes[0])) == {*few} - {"gkd-grpo-strong", "cmdp-at-4", "cmdp-k3"}
    assert set(points(drawn["ablations"].axes[0])) == {"cmdp", "cmdp-k3"}
    assert not drawn["capacity"].axes[0].containers
    assert set(points(drawn["frontier"].axes[2])) == {"sft", "grpo", "gkd-grpo-weak", "gkd-grpo-strong", "cmdp"}


@pytest.mark.parametrize("name", ["03_results", "04_ablations"])
def test_the_notebooks_run_on_the_tables(results, tmp_path, monkeypatch, name):
    import papermill

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params.yaml").touch()
    (tmp_path / "study").mkdir()
    shutil.copy(ROOT / "study" / "params.yaml", tmp_path / "study")
    for drawn in DRAWN:
        path = tmp_path / "figures" / "study" / f"{drawn}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    texts = {"prompt": range(5), "completion": [f"by luck {place}" for place in range(5)], "problem": "2+2"}
    for run, rows in (("cmdp", 5), ("cmdp-hinge", 5), ("grpo", 0)):
        table = pd.DataFrame({"run": run, "seed": 0, **texts}).head(rows)
        write_table(table, tmp_path / "results" / "examples" / run / "0.csv")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{name}.ipynb"), "executed.ipynb", progress_bar=False, kernel_name="python3"
    )
    text = Path("executed.ipynb").read_text()
    if name == "03_results":
        assert "=== cmdp: 5 such completions" in text  # its own, without those of cmdp-hinge
        assert "=== grpo: 0 such completions" in text
        assert text.count("solution: by luck") == 3
        assert "inconclusive" in text
