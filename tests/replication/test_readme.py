"""Generated tables are those of the results files, and what the prose beside them says is so."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmdp.storage import read_yaml, write_json
from replication import readme
from replication.experiments import gather, rows
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
    assert text.count("old") == 2
    for name in ("gain", "verdicts"):
        assert f"<!-- {name}: generated -->\nold\n" in text
    assert "the table verdicts stays as it is" in capsys.readouterr().out


def test_a_missing_marker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(readme.FILES, str(tmp_path / "text.md"), {"results": readme.default_table})
    (tmp_path / "text.md").write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the markers of 'results'"):
        readme.filled(tmp_path / "text.md")


def test_a_gain_stands_beside_what_there_was_to_gain(tmp_path):
    rows = [("cmdp-chance", d, 0.6 + d / 10, 0.97, "within", 0.045, 0.029, 0.061) for d in (0.8, 0.5)]
    rows += [("cmdp", 0.5, 0.5, 0.2, "looser", None, None, None)]
    table = pd.DataFrame(rows, columns=["method", "budget", "accuracy", "csr", "place", "difference", "low", "high"])
    table["soft_lambda"], table["target_difference"], table["target_low"], table["target_high"] = 0.6, 0.05, 0.03, 0.07
    (tmp_path / "study").mkdir()
    table.to_csv(tmp_path / "study" / "equal_csr.csv", index=False)
    contest = {"experiment": ["careful", "measured", "measured"], "budget": [0.5, 0.5, 0.8], "gap": [0, 0.068, 0.071]}
    shares = dict.fromkeys(("teacher", "ceiling", "budgeted", "soft"), 0.5)
    pd.DataFrame(contest | shares).to_csv(tmp_path / "contest.csv", index=False)
    (tmp_path / "chosen.yaml").write_text("best: {ours: cmdp-chance}")
    gain = readme.gain_table(tmp_path).splitlines()[2:]
    assert gain == [
        "| 0.5 nats | 97.0 | 65.0 | +4.5 [+2.9, +6.1] | 6.8 |",
        "| 0.8 nats | 97.0 | 68.0 | +4.5 [+2.9, +6.1] | 7.1 |",
    ]
    equal = readme.equal_table(tmp_path).splitlines()[2:]
    assert equal[0] == "| cmdp-chance | 0.5 | 65.0 | 97.0 | +4.5 [+2.9, +6.1] | +5.0 [+3.0, +7.0] (λ = 0.6) |"
    assert equal[1] == "| cmdp | 0.5 | 50.0 | 20.0 | looser than every λ | +5.0 [+3.0, +7.0] (λ = 0.6) |"
    assert (
        readme.contest_table(tmp_path).splitlines()[2]
        == "| a careful teacher | 0.5 | 50.0 | 50.0 | 50.0 | 50.0 | 0.0 |"
    )


def test_the_default_table_states_the_sizes_of_its_models(here):
    sizes = gather("times", rows(part="default")).groupby("run")["parameters"].max()
    text = readme.default_table(ROOT / "results")
    assert text.endswith(f"The student has {sizes['sft']:,} parameters, the teacher {sizes['teacher']:,}.")


def test_the_laptop_table_says_what_was_measured_and_on_what(tmp_path):
    folder = tmp_path / "laptop"
    folder.mkdir()
    profile = read_yaml(ROOT / "profiles" / "laptop.yaml")
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    measures = {"accuracy": 0.25, "csr": 0.5, "kl_per_token": 0.1234, "cost": 12.0}
    lines = [(run, name, value, value / 2, value * 2) for run in ("sft", "gkd") for name, value in measures.items()]
    summary = pd.DataFrame(lines, columns=["run", "measure", "mean", "low", "high"])
    summary = summary.assign(seeds=1)
    summary.to_csv(folder / "summary.csv", index=False)
    times = {"run": ["gkd"], "time/generation": [9.6], "time/scoring": [5.2], "time/update": [20]}
    pd.DataFrame(times).to_csv(folder / "timing.csv", index=False)
    for run, taken in (("sft", 1.0), ("gkd", 4.7)):
        memory = {"device": "a processor", "threads": 1, "summed_gib": 6.4, "taken_gib": taken}
        write_json(memory, folder / "memory" / run / "0.json")
    write_json({"device": "a processor", "processor": "a processor"}, folder / "provenance.json")
    text = readme.laptop_table(tmp_path)
    shown = "25.0 [12.5, 50.0] | - | 50.0 [25.0, 100.0] | 0.123 [0.062, 0.247] | 12.00 [6.00, 24.00] |"
    assert f"| sft | - | - | - | {shown}" in text
    assert f"| gkd | 9.6 | 5.2 | 20 | {shown}" in text
    batch = profile["train"]["per_device_train_batch_size"] * profile["train"]["gradient_accumulation_steps"]
    assert f"{profile['train']['max_steps']} steps of {batch} completions" in text
    assert "On a processor, 1 thread(s) per run; memory 4.7 GiB, 6.4 by the sum" in text


# ---- what the prose says, which no command writes ----


def test_what_is_said_of_the_contest_is_so():
    gap = pd.read_csv(ROOT / "results" / "contest.csv").set_index(["experiment", "budget"])["gap"]
    assert gap["measured"].loc[0.3:0.8].min() > 0.04  # several points
    assert gap["one kind of prompt"].max() < 0.01  # less than a point
    assert gap["careful"].max() < 0.005  # none


def test_what_the_notebooks_say_of_training_is_so():
    curves = pd.read_csv(ROOT / "results" / "curves.csv")
    last = curves[curves["step"] > 0.9 * curves["step"].max()].groupby("run")[["task_reward", "csr"]].mean()
    assert last.loc["grpo", "task_reward"] > last.loc["cmdp-chance", "task_reward"]
    assert last.loc["grpo", "csr"] < 0.5 < 0.9 < last.loc["cmdp-chance", "csr"]


def test_what_the_notebooks_say_of_completions_beyond_the_budget_is_so():
    table = pd.read_csv(ROOT / "results" / "study" / "violation.csv").query("run in ['grpo', 'cmdp', 'cmdp-chance']")
    table = table.assign(right=table["accuracy"] * table["count"], over=table["low"] >= 1)
    sums = table.groupby("over")[["right", "count"]].sum()
    assert sums.loc[True, "right"] / sums.loc[True, "count"] > sums.loc[False, "right"] / sums.loc[False, "count"]


def test_what_is_said_of_the_learners_on_trees_is_so():
    table = sampled_learners(ROOT / "results" / "theory")
    section_3, ours = table.loc["cmdp"], table.loc["cmdp-hinge-margin"]
    assert section_3["of_optimum_gain_low"] < 0  # does not beat the soft Lagrangian
    assert ours["of_optimum_gain_low"] > 0
    assert ours["of_optimum"] > 0.98
    assert ours["csr"] > 0.99
