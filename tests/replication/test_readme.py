"""Generated tables are those of the results files, and what the prose beside them says is so."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmdp.storage import read_yaml, write_json, write_table, write_text
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
    assert text.count("old") == 3
    for name in ("gain", "laptop", "verdicts"):
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


@pytest.fixture
def laptop(tmp_path) -> Path:
    """Results of the laptop profile, on a processor, with two runs; the same on a GPU as laptop-gpu."""
    profile, measures = read_yaml(ROOT / "profiles" / "laptop.yaml"), {"accuracy": 0.25, "csr": 0.5, "cost": 12.0}
    lines = [(run, name, value, value / 2, value * 2, 1) for run in ("gkd", "sft") for name, value in measures.items()]
    times = {"run": ["gkd", "grpo"], "time/generation": [9.6, 9.8], "time/scoring": [5.2, 5.2], "time/update": [20, 30]}
    for name, device in (("laptop", "a processor"), ("laptop-gpu", "a GPU")):
        write_text(yaml.safe_dump(profile, sort_keys=False), tmp_path / name / "profile.yaml")
        summary = pd.DataFrame(lines, columns=["run", "measure", "mean", "low", "high", "seeds"])
        write_table(summary, tmp_path / name / "summary.csv")
        write_table(pd.DataFrame(times), tmp_path / name / "timing.csv")
        write_json({"device": device}, tmp_path / name / "provenance.json")
        for run, seed, taken in (("grpo", 0, 4.5), ("gkd", 0, 4.7), ("gkd", 1, 4.9), ("sft", 0, 9.0)):
            memory = {"device": device, "threads": 1, "summed_gib": 6.4, "taken_gib": taken}
            write_json(memory, tmp_path / name / "memory" / run / f"{seed}.json")
    return tmp_path


def test_the_laptop_table_says_what_was_measured_and_on_what(laptop):
    train = read_yaml(ROOT / "profiles" / "laptop.yaml")["train"]
    lines = readme.laptop_table(laptop, "laptop").splitlines()
    shown = "25.0 [12.5, 50.0] | 50.0 [25.0, 100.0] | - | 12.00 [6.00, 24.00] |"
    assert lines[2:4] == [f"| sft | {shown}", f"| gkd | {shown}"]  # in the profile's order
    batch = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    assert lines[-1].startswith(f"{train['max_steps']} steps of {batch} completions; 150 held-out prompts, 4 comp")
    assert lines[-1].endswith("seeds: 1; on a processor.")


def test_the_laptops_costs_are_a_row_per_machine(laptop):
    assert readme.laptop_costs_table(laptop).splitlines()[2:] == [
        "| a processor | 9.7 | 5.2 | 25 |",
        "| a GPU | 9.7 | 5.2 | 25 |",
    ]


def test_what_the_laptops_runs_take_stands_beside_the_sum(laptop):
    assert readme.laptop_memory_table(laptop).splitlines()[2:] == [  # the most of all seeds; sft trains nothing
        "| gkd | 4.9 | 6.4 | 4.9 | 6.4 |",
        "| grpo | 4.5 | 6.4 | 4.5 | 6.4 |",
    ]


def test_verdicts_are_grouped_and_none_is_lost(here):
    claims, text = pd.read_csv("results/claims.csv"), readme.verdicts_table(Path("results"))
    for _, row in claims.iterrows():
        (line,) = [line for line in text.splitlines() if f"{row['id']}: " in line]
        assert line.startswith(f"| **{row['verdict']}** | ")


def test_a_gpus_checks_stand_beside_their_sums(tmp_path):
    table = pd.DataFrame({"check": ["kernels", "colab"], "sum_gib": [None, 6.57], "reserved_gib": [None, 6.0]})
    table[["generation_s", "scoring_s", "update_s"]] = [[None] * 3, [14.9, 2.5, 4.5]]
    write_table(table, tmp_path / "gpu" / "checks.csv")
    assert readme.gpu_table(tmp_path).splitlines()[2:] == ["| colab | 6.6 | 6.0 | 22 |"]


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


def test_what_is_said_of_the_laptops_students_is_so():
    table = pd.read_csv(ROOT / "results" / "laptop-gpu" / "summary.csv").pivot(index="run", columns="measure")
    accuracy, csr = table["mean"]["accuracy"], table["mean"]["csr"]
    assert round(100 * (accuracy["grpo"] - accuracy["sft"])) == 29
    assert 0.5 < csr["grpo"] < csr["cmdp"] < 0.65  # two of five leave the budget; the paper's form hardly fewer
    assert csr["gkd"] > 0.99
    assert table["low"]["accuracy"]["gkd"] < accuracy["sft"]  # gains nothing
    share = pd.read_csv(ROOT / "results" / "laptop-gpu" / "ceiling.csv").set_index("run")["share"]
    assert share.idxmax() == "cmdp-chance"
    assert csr["cmdp-chance"] < 0.95
