"""`cmdp distill` on one's own data: files, columns and rewards, the whole way, and the one line for each mistake."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_train import command, small  # noqa: F401

from cmdp import distill, models, tasks, train
from cmdp.methods import METHODS
from cmdp.models import load_tokenizer
from cmdp.tasks import arithmetic

REWARDS = """
def ends(completions, prompts, target, **columns):
    assert all(isinstance(text, str) for text in completions) and set(columns) == {"more"}
    return [0.5 * text.endswith(f"# {right}") + 0.25 for text, right in zip(completions, target)]
def raises(completions, **columns):
    return [1 / 0 for _ in completions]
def too_many(completions, **columns):
    return [1.0] * (len(completions) + 1)
def too_much(completions, **columns):
    return [2.0 for _ in completions]
def narrow(completions, target):
    return [1.0 for _ in completions]
constant = 3
"""
CLASSES = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Grade:
    value: float
def graded(completions, **columns):
    return [Grade(0.5).value for _ in completions]
"""
WORDS = "--student student --teacher teacher --dataset own.jsonl --budget 1.5 --use_cpu --max-steps 2"
WORDS += " --per_device_train_batch_size 4 --num_generations 2 --max_completion_length 6 --prompts 3 --samples 2"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<think>' if thinking else '' }}"


def write(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(small, monkeypatch):  # noqa: F811
    """A dataset and a reward function of one's own beside a small student and teacher."""
    rows = arithmetic.problems({"train": 30}, (2, 3), 0)["train"]
    write("own.jsonl", [{"prompt": row["prompt"], "target": row["answer"], "more": 1} for row in rows])
    Path("rewards.py").write_text(REWARDS)
    return lambda *words: command(monkeypatch, "distill", *WORDS.split(), *words)


def problems(name: str, **settings) -> dict:
    return tasks.load_problems({"name": name, "sizes": {"test": None, "train": None}, "seed": 0, **settings})


# ---- the whole way ----


def test_own_data_and_reward_are_trained_measured_and_exported(own, monkeypatch, capsys):
    own("--reward", "rewards.py:ends", "--lora", "--lora-r", "2", "--output", "mine")
    said = capsys.readouterr().out
    folder = Path("models/mine/cmdp-chance/0")
    assert "results/mine/summary.csv" in said
    assert f"The student is in {folder}" in said
    assert {"mean_reward", "csr", "cost"} <= set(said.split())  # rewards of 0.25 and 0.75
    assert "accuracy" not in said
    assert set(pd.read_csv("results/mine/summary.csv")["measure"]) >= {"accuracy", "greedy_accuracy"}
    record = json.loads((folder / "cmdp.json").read_text())
    assert record["settings"]["csr_target"] == METHODS["cmdp-chance"]["csr_target"]
    assert record["settings"]["budget"] == 1.5
    completions = pd.read_csv("results/mine/completions/cmdp-chance/0.csv")
    assert set(completions["correct"]) <= {0.25, 0.75}  # the reward that was trained on, in evaluation too
    assert set(pd.read_csv("results/mine/summary.csv")["run"]) == {"sft", "cmdp-chance"}
    assert "validity" not in set(pd.read_csv("results/mine/summary.csv")["measure"])
    # the same command finds all done; another measurement says the same of the same prompts
    own("--reward", "rewards.py:ends", "--lora", "--lora-r", "2", "--output", "mine")
    assert f"{folder} is finished" in capsys.readouterr().out
    folder.rename("moved")
    command(monkeypatch, "evaluate", "moved")
    table = capsys.readouterr().out
    assert {"mean_reward", "greedy_mean_reward", "mean_reward_within"} <= set(table.split())
    again = train.evaluate(Path("moved")).set_index("measure")["mean"]
    for measure, called in (("accuracy", "mean_reward"), ("csr", "csr"), ("cost", "cost")):
        assert again[measure] == pytest.approx(record["measured"][called]["mean"])
    assert train.evaluate(Path("moved"), prompts=1, split="train")["mean"].notna().all()
    command(monkeypatch, "export", "moved", "out")
    card = Path("out/README.md").read_text()
    assert "| mean_reward |" in card
    assert "accuracy" not in card


def test_the_ceiling_is_measured_before_training_and_the_account_after_it(own, monkeypatch, capsys):
    words = [*WORDS.split(), "--reward", "exact", "--answer_column", "target", "--output", "mine"]
    sizes = ["--prompts", "4", "--samples", "3"]
    without = " ".join(words).replace("--budget 1.5 ", "").split()  # which it is there to choose
    command(monkeypatch, "ceiling", *sizes, *without, "--lora", "--lora-r", "2")
    assert "No budget buys accuracy" in capsys.readouterr().out  # the small teacher is never right
    prices = pd.read_csv("results/mine/ceiling.csv")
    assert prices["plug_in"].is_monotonic_increasing
    assert prices["budget"][0] == 0
    command(monkeypatch, "distill", *words)
    folder = ["--folder", "models/mine/cmdp-chance/0"]
    for wrong, message in (
        ([*folder, "--reward", "exact"], "--reward does not go with --folder"),
        ([*folder, "--samples", "1"], "--samples 2 or more"),
        ([*folder, "--prompts", "0"], "prompts, samples and batch_size of an evaluation are 1 or more"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, "ceiling", *wrong)
    with pytest.raises(SystemExit, match="prompts, samples and batch_size"):
        command(monkeypatch, "evaluate", folder[1], "--samples", "0")
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_base", lambda *_: pytest.fail("weights were loaded"))
        for wrong, message in (
            (["ceiling", *folder, "--split", "dev"], "There is no split 'dev'"),
            (["evaluate", folder[1], "--split", "dev"], "There is no split 'dev'"),
            (["ceiling", *without, "--prompt_column", "text"], "has no column 'text'"),
            (["ceiling", *without, "--reward", "rewards.py:raises"], "raised ZeroDivisionError"),
        ):
            with pytest.raises(SystemExit, match=message):
                command(patched, *wrong)
    command(monkeypatch, "ceiling", *sizes, *folder)
    found = json.loads(Path("results/mine/ceiling-cmdp-chance-0.json").read_text())
    assert found["cost"] == pytest.approx(found["useful"] + found["wasted"])
    with pytest.raises(SystemExit, match="a reward that is 0 or 1"):
        command(monkeypatch, "ceiling", *sizes, *WORDS.split(), "--reward", "rewards.py:ends", "--output", "other")


def test_other_settings_do_not_replace_a_student_and_another_measurement_trains_none(own, monkeypatch, capsys):
    words = ["--reward", "rewards.py:ends", "--output", "mine"]
    own(*words)
    folder, results = Path("models/mine/cmdp-chance/0"), Path("results/mine/completions")
    weights = (folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_base", lambda *_: pytest.fail("weights were loaded"))
        for more, said in (
            (
                ["--budget", "0.5"],
                r"cmdp-chance/0 was trained with budget\.budget=1\.5, not 0\.5\. Give another --output",
            ),
            (["--learning_rate", "0.1"], r"train\.learning_rate=None, not 0\.1"),
            (["--lora"], r"sft/0 was trained with student\.lora=None, not \{'r': 16, 'alpha': 32\}"),
            (
                ["--reward", "rewards.py:raises"],
                r"sft/0 was trained with task\.name=rewards\.py:ends, not rewards\.py:r",
            ),
            (["--teacher", "student"], r"sft/0 was trained with teacher\.model=teacher, not student"),
        ):
            with pytest.raises(SystemExit, match=said) as raised:
                own(*words, *more)
            assert "\n" not in str(raised.value)
    capsys.readouterr()
    own(*words, "--samples", "3")
    assert capsys.readouterr().out.count("is finished") == 2
    for run in ("sft", "cmdp-chance"):
        assert len(pd.read_csv(results / run / "0.csv")) == 3 * (3 + 1)
    assert json.loads((folder / "cmdp.json").read_text())["experiment"]["evaluate"]["samples"] == 3
    assert (folder / "model.safetensors").read_bytes() == weights
    # the student before training serves every budget, at which it is measured
    own(*words, "--samples", "3", "--method", "gkd", "--budget", "1e9")
    record = json.loads(Path("models/mine/sft/0/cmdp.json").read_text())
    assert (record["settings"]["budget"], record["measured"]["csr"]["mean"]) == (1e9, 1.0)
    # the same words over other data: it is trained again, and said so
    Path("rewards.py").write_text(REWARDS.replace("0.25", "0.125"))
    capsys.readouterr()
    own(*words, "--samples", "3")
    assert f"{folder} was trained with other inputs or code: it is replaced" in capsys.readouterr().out
    assert set(pd.read_csv(results / "cmdp-chance/0.csv")["correct"]) <= {0.125, 0.625}


def test_a_reward_that_teaches_nothing_is_said_early_and_at_the_end(own, capsys):
    words = ["--reward", "exact", "--answer_column", "target", "--max_steps", "11", "--save_steps", "50"]
    own(*words, "--no_before")
    said = capsys.readouterr().err
    assert "In 10 steps all completions of a prompt earned the same reward" in said
    assert "In 11 steps all completions of a prompt earned the same reward" in said
    own(*words, "--no_before", "--method", "gkd")  # which asks for none
    assert "earned the same" not in capsys.readouterr().err
    Path("any.py").write_text("def vary(completions, **columns): return [len(set(x)) % 5 / 5 for x in completions]")
    own("--reward", "any.py:vary", "--no_before", "--output", "other")
    assert "earned the same" not in capsys.readouterr().err


def test_a_file_of_rewards_runs_once_until_it_changes(own, tmp_path):
    text = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n" + REWARDS
    for runs in (1, 2):
        Path("counted.py").write_text(text + "\n" * runs)
        for name in ("ends", "raises"):
            tasks.load_task(f"counted.py:{name}")
        assert len((tmp_path / "runs").read_text()) == runs


def test_keys_come_from_a_file_and_the_command_line_wins(own):
    Path("keys.yaml").write_text(
        "student: a\nteacher: b\ndataset: c\nreward: gsm8k\nbudget: 0.15\nteacher_4bit: true\n"
    )
    options, settings = distill.parse(["--config", "keys.yaml", "--budget-form", "per_token", "--reward", "math"])
    assert (options.student, options.reward, options.teacher_4bit) == ("a", "math", True)
    assert settings == {"budget": 0.15, "budget_form": "per_token"}
    made = distill.experiment(options, settings | {"chat_template_kwargs": '{"enable_thinking": false}'})
    assert made.task["chat_template_kwargs"] == {"enable_thinking": False}
    assert made.teacher.four_bit
    assert made.name == "a-c"
    names = []
    for student in ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct", "models/small.gguf"):
        own = {**vars(options), "student": student, "dataset": "data/v1.5.jsonl"}
        names.append(distill.experiment(distill.Distill(**own), settings).name)
    assert names == ["qwen2.5-7b-instruct-v1.5", "qwen2.5-14b-instruct-v1.5", "small-v1.5"]


def test_settings_of_the_method_are_not_asked_of_the_student_before_training(own):
    words = [*WORDS.split(), "--reward", "rewards.py:ends", "--method", "dual", "--dual_rate", "0.1"]
    made = distill.experiment(*distill.parse(words))
    assert [*made.runs] == ["sft", "dual"]
    words += ["--num_train_epochs", "2"]
    assert distill.experiment(*distill.parse(words)).train["max_steps"] == 2
    words = " ".join(words).replace(" --max-steps 2", "").split()
    assert distill.experiment(*distill.parse(words)).train["max_steps"] == -1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reward exact --dataset nowhere.jsonl", "nowhere.jsonl is no file or folder here"),
        ("--reward exact", r"own\.jsonl \(train\), row 1: .*no answer in its columns prompt, target, more"),
        (
            "--reward exact --answer_column gold",
            r"has no column 'gold'\. It has: prompt, target, more\. .*--answer_column",
        ),
        ("--reward exact --prompt_column text", "has no column 'text'.* Name yours by --prompt_column"),
        ("--reward chess", "The task is one of .*not 'chess'"),
        ("--reward rewards.py:nothing", r"rewards\.py has no function 'nothing'\. It has: ends, raises"),
        ("--reward rewards.py:constant", "has no function 'constant'"),
        ("--reward none.py:ends", r"There is no none\.py"),
        ("--reward broken.py:ends", r"broken\.py does not run: SyntaxError"),
        ("--reward rewards.py:raises", "raised ZeroDivisionError: division by zero"),
        ("--reward rewards.py:too_many", "not 2 for 1 completions"),
        ("--reward rewards.py:too_much", r"one reward in \[0, 1\] for each completion, not 2"),
        ("--reward rewards.py:narrow", "raised TypeError: .*unexpected keyword argument 'prompts'"),
        ("--reward rewards.py:ends --method ppo", "There is no method 'ppo'"),
        ("--reward rewards.py:ends --budget -1", "budget must be 0 nats or more"),
        ("--reward rewards.py:ends --max_stepz 3", "There is no --max_stepz"),
        ("--reward rewards.py:ends --learning_rate fast", "learning-rate: invalid float value: .fast"),
        ("--reward rewards.py:ends --report_to abacus", "report_to knows no tracker 'abacus'"),
        ("--reward rewards.py:ends --report_to swanlab", "swanlab is not installed: pip install swanlab"),
        ("--reward rewards.py:ends --use_cpu false", "use_cpu=false asks for a GPU and PyTorch finds none"),
        ("--reward rewards.py:ends --student_4bit", "4-bit weights cannot themselves be trained"),
        ("--reward rewards.py:ends --lora_r 4", "--lora_r and --lora_alpha need --lora"),
        ("--reward rewards.py:ends --chat_template_kwargs {no", "--chat_template_kwargs takes a JSON object"),
        ("--reward rewards.py:ends --bf16 --use_cpu false", "bf16 asks for a GPU and PyTorch finds none"),
        ("--reward rewards.py:ends --output a/b", "is no name"),
        ("--reward rewards.py:ends --prompt_length 1", "No problem has 1 tokens"),
        ("--reward rewards.py:ends --config none.yaml", r"There is no none\.yaml"),
        ("--reward rewards.py:ends --config wrong.yaml", "There is no --stundent"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_weights_load(own, monkeypatch, words, message):
    monkeypatch.setattr(models, "load_base", lambda *_: pytest.fail("weights were loaded"))
    Path("broken.py").write_text("def ends(:")
    Path("wrong.yaml").write_text("stundent: 3")
    with pytest.raises(SystemExit, match=message) as raised:
        own(*words.split())
    assert "\n" not in str(raised.value)
    assert str(raised.value).count("cmdp distill") - str(raised.value).count("cmdp distill --help") == 1
    assert not Path("models").exists()


def test_help_lists_the_keys_and_every_field_of_the_trainer(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "distill", "--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in ("student", "reward", "budget", "sharpness", "max_steps"))


def test_required_keys_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"required: .*--teacher"):
        distill.parse(["--student", "a"])
    words = ["--student", "a", "--teacher", "b", "--dataset", "c", "--reward", "exact"]
    with pytest.raises(ValueError, match="--budget is missing"):
        distill.experiment(*distill.parse(words))


@pytest.mark.parametrize("name", ["models", "results"])
def test_a_folder_that_cannot_be_written_is_said_before_weights_load(own, monkeypatch, name):
    Path(name).write_text("a file")
    with pytest.raises(SystemExit, match=f"{name}.* cannot be written"):
        own("--reward", "rewards.py:ends")


# ---- data ----


def test_a_tenth_is_held_out_of_a_dataset_without_a_test_split_and_duplicates_are_kept_once(own):
    rows = [{"prompt": f"( {n % 20} )", "answer": n % 20} for n in range(40)]
    write("many.jsonl", rows)
    splits = problems("exact", source="many.jsonl")
    assert (len(splits["test"]), len(splits["train"])) == (2, 18)
    assert {row["prompt"] for row in splits["test"]}.isdisjoint(row["prompt"] for row in splits["train"])
    assert tasks.load_task("exact").is_correct(" 7\n", "7")
    assert problems("exact", source="many.jsonl") == splits
    assert problems("exact", source="many.jsonl", seed=1)["test"] != splits["test"]
    write("held.jsonl", rows[:5])
    assert len(problems("exact", source="many.jsonl", test="held.jsonl")["train"]) == 15
    pd.DataFrame(rows).to_csv("many.csv", index=False)
    assert problems("exact", source="many.csv") == splits


def test_prompts_are_text_messages_or_questions(own):
    tokenizer = load_tokenizer("student")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}]
    write("chat.jsonl", [{"prompt": messages, "answer": "2"}, {"prompt": [messages[1]], "answer": "2"}])
    write("text.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1 + 2 =", "answer": "3"}])
    write("asked.jsonl", [{"problem": " 1 + 1? ", "answer": "2"}, {"problem": "1 + 2?", "answer": "3"}])
    settings = {"name": "exact", "sizes": {"train": 2}, "seed": 0}

    def prompts(source, **more):
        return {row["prompt"] for row in tasks.load_problems(settings | {"source": source, **more}, tokenizer)["train"]}

    with pytest.raises(ValueError, match=r"row 1: .*the tokenizer has no chat template"):
        prompts("chat.jsonl")
    assert prompts("asked.jsonl") == {"1 + 1?", "1 + 2?"}
    assert "Add.\n\nQuestion: 1 + 1?\nAnswer:" in prompts("asked.jsonl", instruction="Add.")
    tokenizer.chat_template = CHAT
    assert prompts("chat.jsonl") == {"<system>Be brief.<user>1 + 1", "<user>1 + 1"}
    assert "<user>1 + 1<think>" in prompts("chat.jsonl", chat_template_kwargs={"thinking": True})
    assert prompts("text.jsonl") == {"1 + 1 =", "1 + 2 ="}
    assert prompts("asked.jsonl", instruction="Add.") == {"<user>1 + 1?\n\nAdd.", "<user>1 + 2?\n\nAdd."}


def test_answers_of_gsm8k_and_math_are_numbers_too(own):
    write("numbers.jsonl", [{"question": f"How many is {n}?", "answer": n} for n in range(10)])
    for name in ("gsm8k", "math"):
        rows = problems(name, source="numbers.jsonl")["train"]
        assert all(row["prompt"].startswith("Solve the problem step by step") for row in rows)
        assert {row["answer"] for row in rows} < {str(n) for n in range(10)}


def test_a_reward_may_be_written_with_dataclasses(own):
    Path("classes.py").write_text(CLASSES)
    assert tasks.load_task("classes.py:graded").reward([""], prompts=[""]) == [0.5]


# ---- progress ----


def test_the_bar_shows_steps_csr_and_reward_on_a_terminal(own, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    own("--reward", "rewards.py:ends", "--no_before")
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "sampled completions: " in shown
    assert "csr=" in shown
    assert "task_reward=0." in shown
