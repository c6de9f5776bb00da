"""Generated tables are those of the results files, and what the prose beside them says is so."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmdp.methods import METHODS
from cmdp.statistics import with_budget
from cmdp.storage import read_yaml, write_json
from replication import readme
from replication.experiments import gather, rows
from replication.tables import difference
from replication.theory.tables import sampled_learners

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def marked(names) -> str:
    return "".join(f"before\n<!-- {name}: generated -->\nold\n<!-- {name}: end -->\nafter\n" for name in names)


@pytest.mark.parametrize("path", readme.FILES)
def test_generated_tables_are_those_of_the_results_files(here, path):
    assert readme.filled(Path(path)) == Path(path).read_text(encoding="utf-8"), "run `python -m replication readme`"


@pytest.mark.parametrize("path", readme.FILES)
def test_tables_are_written_between_their_markers_alone(here, tmp_path, monkeypatch, path):
    monkeypatch.setitem(readme.FILES, str(tmp_path / "text.md"), readme.FILES[path])
    (tmp_path / "text.md").write_text(marked(readme.FILES[path]))
    text = readme.filled(tmp_path / "text.md")
    assert "old" not in text
    assert text.count("before\n<!-- ") == text.count("end -->\nafter\n") == len(readme.FILES[path])
    for table in readme.FILES[path].values():
        assert f"generated -->\n{table(ROOT / 'results')}\n<!--" in text


def test_before_the_study_has_run_its_tables_stay_as_they_are(here, tmp_path, monkeypatch, capsys):
    (tmp_path / "summary.csv").symlink_to(ROOT / "results" / "summary.csv")
    monkeypatch.setitem(readme.FILES, str(tmp_path / "text.md"), readme.FILES["README.md"])
    (tmp_path / "text.md").write_text(marked(readme.FILES["README.md"]))
    (tmp_path / "runs").symlink_to(ROOT / "results" / "runs")
    text = readme.filled(tmp_path / "text.md", tmp_path)
    assert text.count("old") == 1
    assert "<!-- verdicts: generated -->\nold\n" in text
    assert "the table verdicts stays as it is" in capsys.readouterr().out


def test_a_missing_marker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(readme.FILES, str(tmp_path / "text.md"), {"results": readme.default_table})
    (tmp_path / "text.md").write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the markers of 'results'"):
        readme.filled(tmp_path / "text.md")


def test_greedy_accuracy_stands_beside_the_sampled_and_is_a_dash_where_it_was_not_measured(here):
    results = ROOT / "results"
    summary = pd.read_csv(results / "summary.csv").set_index(["run", "measure"])
    greedy = readme.cell(summary.loc[("cmdp", "greedy_accuracy")])
    for table in (readme.default_table(results), readme.study_table(results)):
        names = table.splitlines()[0].split(" | ")
        place = next(at for at, name in enumerate(names) if name.startswith("greedy accuracy (%"))
        lines = [line.split(" | ") for line in table.splitlines()[2:] if line.startswith("| ")]
        found = {line[0].strip("| "): line[place] for line in lines}
        assert found["cmdp"] == greedy
    assert found["dual"] == "-"


def test_the_default_table_states_the_sizes_of_its_models(here):
    text = readme.default_table(ROOT / "results")
    assert text.endswith("The student has 85,376 parameters, the teacher 281,856.")


def test_the_laptop_table_says_what_was_measured_and_on_what(tmp_path):
    folder = tmp_path / "laptop"
    folder.mkdir()
    profile = read_yaml(ROOT / "profiles" / "laptop.yaml")
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    measures = {"accuracy": 0.25, "csr": 0.5, "kl_per_token": 0.1234, "cost": 12.0}
    lines = [(run, name, value, value / 2, value * 2) for run in ("sft", "gkd") for name, value in measures.items()]
    summary = pd.DataFrame(lines, columns=["run", "measure", "mean", "low", "high"])
    summary.to_csv(folder / "summary.csv", index=False)
    times = {"run": ["gkd"], "time/generation": [9.6], "time/scoring": [5.2], "time/update": [20]}
    pd.DataFrame(times).to_csv(folder / "timing.csv", index=False)
    for run, taken in (("sft", 1.0), ("gkd", 4.7)):
        memory = {"device": "a processor", "threads": 1, "summed_gib": 6.4, "taken_gib": taken}
        write_json(memory, folder / "memory" / run / "0.json")
    text = readme.laptop_table(tmp_path)
    shown = "25.0 [12.5, 50.0] | - | 50.0 [25.0, 100.0] | 0.123 [0.062, 0.247] | 12.0 [6.0, 24.0] |"
    assert f"| sft | - | - | - | {shown}" in text
    assert f"| gkd | 10 | 5 | 20 | {shown}" in text
    batch = profile["train"]["per_device_train_batch_size"] * profile["train"]["gradient_accumulation_steps"]
    assert f"{profile['train']['max_steps']} steps of {batch} completions" in text
    assert "On a processor, 1 thread(s) per run; memory 4.7 GiB, 6.4 by the sum" in text


# ---- what the prose says, which no command writes ----


def test_what_is_said_of_the_default_experiment_is_so(here):
    budget = read_yaml(ROOT / "params.yaml")["budget"]
    soft = read_yaml(ROOT / "results" / "chosen.yaml")["best"]["soft"]
    completions = gather("completions", rows(part="default")).query("split == 'test' and decoding == 'sampled'")
    by_run = dict(list(with_budget(completions, **budget).groupby("run")))

    def minus(run: str, column: str) -> tuple:
        return difference(by_run[run], by_run[soft], column)[1:3]

    for column in ("correct", "satisfied", "correct_within"):
        assert minus("cmdp", column)[1] < 0  # stays below on every column
        low, high = minus("cmdp-adaptive", column)
        assert low < 0 < high  # is not told apart on any
    assert minus("cmdp-overshoot", "correct_within")[1] < 0


def test_what_is_said_of_the_study_is_so():
    folder = ROOT / "results" / "study"
    summary = pd.read_csv(folder / "summary.csv").set_index(["run", "measure"])["mean"]
    for run in ("cmdp-adaptive", "cmdp-adaptive-at-4", "cmdp-adaptive-half"):
        assert summary[run, "csr"] > 0.95
    assert 0.94 < summary["cmdp-adaptive-at-1", "csr"] < 0.95
    assert summary["cmdp-adaptive-equal", "csr"] == pytest.approx(0.93, abs=0.005)
    frontier = pd.read_csv(folder / "frontier.csv")
    assert frontier.loc[frontier["budget"] == 0.5, "csr"].max() < 0.95  # out of reach for every method, ...
    tenth = [name for name, row in rows(ROOT / "experiments.yaml").items() if row.start == "student-tenth"]
    assert max(summary[name, "csr"] for name in tenth) < 0.95
    log = pd.read_csv(ROOT / "results" / "runs" / "default" / "cmdp-adaptive" / "training.csv")
    assert (log["csr"] < METHODS["cmdp-adaptive"]["csr_target"]).mean() > 0.9
    sweep = pd.read_csv(folder / "strength.csv").query("method == 'gkd-grpo' and measure == 'accuracy_within'")
    assert sweep.sort_values("lam")["mean"].is_monotonic_increasing
    differences = pd.read_csv(folder / "ablations.csv").query("measure == 'accuracy_within'").set_index("run")
    assert differences.loc["gkd-few-prompts", "difference"] == pytest.approx(-0.18, abs=0.01)  # points
    for run in ("grpo-few-prompts", "cmdp-few-prompts"):
        assert differences.loc[run, "low"] < 0 < differences.loc[run, "high"]
    methods = pd.read_csv(folder / "summary.csv").query("family == 'method' and measure == 'accuracy_within'")
    ours = methods[methods["start"] == "student"].set_index("run")["mean"]
    assert ours.idxmax() == "trl-gkd"
    assert abs(ours["cmdp"] - ours["sft"]) < 0.02  # about where it began
    trials = pd.read_csv(ROOT / "results" / "tuning.csv").query("run == 'cmdp' and lam == 0.3")
    assert trials.sort_values("learning_rate")["csr"].is_monotonic_decreasing
    assert differences.loc["cmdp-single-step", "difference"] > 0
    assert differences.loc["gkd-grpo-both-parts", "high"] < 0


def test_what_is_said_of_the_learners_on_trees_is_so():
    table = sampled_learners(ROOT / "results" / "theory")
    section_3, ours = table.loc["cmdp"], table.loc["cmdp-hinge-margin"]
    assert section_3["of_optimum_gain_low"] < 0  # does not beat the soft Lagrangian
    assert ours["of_optimum_gain_low"] > 0
    assert ours["of_optimum"] > 0.98
    assert ours["csr"] > 0.99
