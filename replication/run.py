"""The pipeline's training stages: start models, runs, and trials of tuning."""

import itertools

import pandas as pd

from cmdp import storage
from cmdp.models import ModelSpec, build_model, build_tokenizer
from cmdp.statistics import with_budget
from cmdp.tasks import load_problems, load_task
from cmdp.train import (
    LOGGED,
    PHASES,
    TRAINING,
    Budget,
    Evaluation,
    Experiment,
    load_trained,
    measure,
    run_trainer,
    steps_to,
    train,
)
from replication.experiments import CHOSEN, COLUMNS, EXPERIMENTS, PARAMS, RESULTS, START, row, sections


def pretrain(role: str) -> None:
    """Train the teacher, or a student before distillation, on solutions: results/start/ROLE."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    storage.check_names(role)
    roles, supervised, task = sections(PARAMS, "start", "supervised", "task")
    if role not in roles:
        raise ValueError(f"{PARAMS} has no start model {role!r}. It has: {', '.join(roles)}.")
    shape = dict(roles[role])
    settings = supervised | {key: shape.pop(key) for key in ("max_steps", "learning_rate")}
    tokenizer = build_tokenizer(load_task(task["name"]).vocabulary())
    model = build_model(tokenizer, **shape, seed=settings["seed"])
    problems = load_problems(task)["supervised"]
    made_by = storage.fingerprint({"shape": shape, "settings": settings, "problems": problems}, [])
    checkpoints, resume = storage.checkpoint_folder(f"start/{role}", made_by)
    texts = ([problem[key] for problem in problems] for key in ("prompt", "solution"))
    ids = zip(*(tokenizer(column, add_special_tokens=False).input_ids for column in texts), strict=True)
    encoded = [  # the prompt carries no loss
        {"input_ids": [*p, *s, tokenizer.eos_token_id], "completion_mask": [0] * len(p) + [1] * (len(s) + 1)}
        for p, s in ids
    ]
    fixed = {"packing": False, "shuffle_dataset": False, "gradient_checkpointing": False, "bf16": False}
    quiet = {"report_to": [], "disable_tqdm": True, "save_only_model": False}
    args = SFTConfig(output_dir=str(checkpoints), **fixed, **quiet, **settings)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(encoded), processing_class=tokenizer)
    with steps_to(checkpoints / "steps.txt"):
        log = run_trainer(trainer, resume)
    with storage.whole(START / role) as folder, storage.named(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    storage.drop(checkpoints)
    losses = [round(entry["loss"], 4) for entry in log if "loss" in entry]
    print(f"{START / role}: {model.num_parameters():,} parameters, losses in nats per token {losses[-3:]}")


def experiment(name: str, start: str, runs: dict[str, dict]) -> Experiment:
    """The experiment of params.yaml, with `runs`, from the student `start`."""
    task, budget, trained, measured = sections(PARAMS, "task", "budget", "train", "evaluate")
    evaluate = Evaluation(**{key: value for key, value in measured.items() if key != "longer"})
    models = {"student": ModelSpec(str(START / start)), "teacher": ModelSpec(str(START / "teacher"))}
    shared = {"task": task, "budget": Budget(**budget), "train": trained, "seeds": []}
    return Experiment(name=name, runs=runs, evaluate=evaluate, **models, **shared)


def run(key: str) -> None:
    """Train and measure one run, all of its seeds: results/runs/PART/KEY. Raises `ValueError` if there is no such run,
    or tuning has chosen no settings for it."""
    this, (chosen,) = row(key), sections(CHOSEN, "runs")
    if not isinstance(chosen.get(this.tuned), dict):
        raise ValueError(f"{CHOSEN} has no settings of {this.tuned!r}: give it trials in {EXPERIMENTS}, and tune it.")
    planned = experiment(this.part, this.start, {key: {"method": this.method, **chosen[this.tuned], **this.settings}})
    found = [_measured(planned, key, seed, compact=this.part != "default") for seed in this.seeds]
    with storage.whole(this.folder()) as folder:
        for name in found[0]:
            storage.write_table(pd.concat([tables[name] for tables in found]), folder / f"{name}.csv")
    print(f"{this.folder()}: {len(this.seeds)} seeds")


def _measured(planned: Experiment, key: str, seed: int, compact: bool) -> dict[str, pd.DataFrame]:
    """The tables of one run and seed. `compact` leaves out what only the default experiment shows: greedy completions,
    the training curve, the cost by position, and examples of wrong steps that lead to the right answer."""
    folder = train(planned, key, seed, check_fit=False)
    pair, (task, evaluate) = load_trained(planned, key, seed), sections(PARAMS, "task", "evaluate")
    test, positions = measure(planned, pair, seed, greedy=planned.evaluate.greedy and not compact)
    longer = dict(evaluate["longer"])
    drawn = {"sizes": {"longer": longer.pop("prompts")}, "steps": longer.pop("steps")}
    problems = load_problems(task | drawn)["longer"]
    more, _ = measure(planned, pair, seed, problems, greedy=False, **longer)
    completions = pd.concat([test.assign(split="test"), more.assign(split="longer")], ignore_index=True)
    completions = completions[["split", *completions.columns.drop(["split", "completion"])]]
    log = storage.read(folder / TRAINING)
    steps = log[log["csr"].notna()] if "csr" in log else log.iloc[:0]
    times = {"steps": planned.train["max_steps"], "seconds": log.get("seconds", pd.Series([0.0])).max()}
    times |= {"parameters": pair[0].num_parameters(), **steps.reindex(columns=PHASES).median()}
    tables = {"completions": completions, "times": pd.DataFrame([times])}
    if compact:
        tables["completions"] = completions.reindex(columns=[name for name in COLUMNS if name != "seed"]).round(4)
    else:
        lucky = test.query("decoding == 'sampled' and correct == 1 and valid == 0")[["prompt", "completion"]]
        held_out = load_problems(task)[planned.evaluate.split]
        lucky = lucky.assign(problem=[held_out[index]["prompt"].strip() for index in lucky["prompt"]])
        tables |= {"positions": positions, "training": steps.reindex(columns=LOGGED), "examples": lucky}
    for table in tables.values():
        table.insert(0, "seed", seed)
    return tables


def trial(name: str) -> None:
    """Train the trials of one entry of tuning, and measure them on validation prompts: results/tuning/NAME.csv."""
    (tuning,), (task, budget) = sections(EXPERIMENTS, "tuning"), sections(PARAMS, "task", "budget")
    storage.check_names(name)
    if name not in tuning["trials"]:
        raise ValueError(f"{EXPERIMENTS} has no trials of {name!r}. It has: {', '.join(tuning['trials'])}.")
    method, grid = tuning["trials"][name]["method"], tuning["trials"][name]["grid"]
    runs = {f"{name}-{index}": {"method": method, **tried} for index, tried in enumerate(grid)}
    planned, problems, rows = experiment("tuning", "student", runs), load_problems(task)["validation"], []
    measures = {"accuracy": "correct", "csr": "satisfied", "accuracy_within": "correct_within", "cost": "cost"}
    for (index, key), seed in itertools.product(enumerate(runs), tuning["seeds"]):
        train(planned, key, seed, check_fit=False)
        pair = load_trained(planned, key, seed)
        completions, _ = measure(planned, pair, seed, problems, samples=tuning["samples"], greedy=False)
        sampled = with_budget(completions, **budget)
        means = {measure: sampled[column].mean() for measure, column in measures.items()}
        rows.append({"index": index, "seed": seed, **grid[index], **means})
    path = RESULTS / "tuning" / f"{name}.csv"
    storage.write_table(pd.DataFrame(rows), path)
    print(f"{path}: {len(rows)} trials")
