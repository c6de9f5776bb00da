"""The pipeline's training stages: start models, runs, and trials of tuning."""

from pathlib import Path

import pandas as pd
import torch

from cmdp import storage
from cmdp.evaluation import score
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
from replication import experiments
from replication.experiments import CHOSEN, COLUMNS, EXPERIMENTS, PARAMS, RESULTS, START, row, sections

MEASURES = {"accuracy": "correct", "csr": "satisfied", "cost": "cost"}  # of a trial, and their columns


def pretrain(role: str) -> None:
    """Train the teacher, or a student before distillation, on solutions: results/start/ROLE."""
    storage.check_names(role)
    roles, supervised, task = sections(PARAMS, "start", "supervised", "task")
    if role not in roles:
        raise ValueError(f"{PARAMS} has no start model {role!r}. It has: {', '.join(roles)}.")
    shape = dict(roles[role])
    settings = supervised | {key: shape.pop(key) for key in ("max_steps", "learning_rate")}
    task["sizes"] = settings.pop("sizes")
    tokenizer = build_tokenizer(load_task(task["name"]).vocabulary())
    model = build_model(tokenizer, **shape, seed=settings["seed"])
    texts = [(problem["prompt"], problem["solution"]) for problem in load_problems(task)["supervised"]]
    checkpoints = learn(model, tokenizer, texts, f"start/{role}", {"shape": shape}, bf16=False, **settings)
    with storage.whole(START / role) as folder, storage.named(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    storage.drop(checkpoints)
    print(f"{START / role}: {model.num_parameters():,} parameters")


def learn(model, tokenizer, texts: list[tuple[str, str]], name: str, made_from: dict, **settings) -> Path:
    """Train `model`, in place, to complete the prompts of `texts` by their solutions; a prompt carries no loss.
    `settings` are fields of `SFTConfig`. Returns the folder of its checkpoints, from which the same run resumes until
    the caller drops it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made_by = storage.fingerprint(made_from | {"settings": settings, "texts": texts}, [])
    checkpoints, resume = storage.checkpoint_folder(name, made_by)
    columns = zip(*texts, strict=True)
    prompts, answers = (tokenizer([*column], add_special_tokens=False).input_ids for column in columns)
    ids, end = zip(prompts, answers, strict=True), [tokenizer.eos_token_id]
    rows = ({"input_ids": p + s + end, "completion_mask": [0] * len(p) + [1] * (len(s) + 1)} for p, s in ids)
    fixed = {"packing": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    args = SFTConfig(output_dir=str(checkpoints), **fixed, **settings)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list([*rows]), processing_class=tokenizer)
    with steps_to(checkpoints / "steps.txt"):
        log = run_trainer(trainer, resume)
    print(f"{name}: losses in nats per token {[round(entry['loss'], 4) for entry in log if 'loss' in entry][-3:]}")
    return checkpoints


def experiment(name: str, start: str, runs: dict[str, dict]) -> Experiment:
    """The experiment of params.yaml, with `runs`, from the student `start`."""
    task, budget, trained, measured = sections(PARAMS, "task", "budget", "train", "evaluate")
    evaluate = Evaluation(**measured)
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
    """The tables of one run and seed. `compact` leaves out what only the default experiment shows: the training curve
    and the cost by position."""
    folder = train(planned, key, seed, check_fit=False)
    pair, evaluated = load_trained(planned, key, seed), planned.evaluate
    problems = planned.problems(evaluated.split, pair[-1])
    completions, positions = measure(planned, pair, seed, problems[: evaluated.prompts])
    log = storage.read(folder / TRAINING)
    steps = log[log["csr"].notna()] if "csr" in log else log.iloc[:0]
    times = {"steps": planned.train["max_steps"], "seconds": log.get("seconds", pd.Series([0.0])).max()}
    times |= {"parameters": pair[0].num_parameters(), **steps.reindex(columns=PHASES).median()}
    kept = completions[[name for name in COLUMNS if name != "seed"]].round(4)
    tables = {"completions": kept, "exact": chances(pair[0], pair[-1], problems), "times": pd.DataFrame([times])}
    if not compact:
        tables |= {"positions": positions, "training": steps.reindex(columns=LOGGED)}
    for table in tables.values():
        table.insert(0, "seed", seed)
    return tables


@torch.no_grad()
def chances(student, tokenizer, problems: list[dict]) -> pd.DataFrame:
    """The student's probability of each token of each problem's right completion: `prompt` (index), `right`, their
    product, and `step_1`, `step_2`, ... as long as the problem has steps."""
    prompts = tokenizer([row["prompt"] for row in problems], add_special_tokens=False, padding=True)
    solutions = [row["solution"] + tokenizer.eos_token for row in problems]
    solutions = tokenizer(solutions, add_special_tokens=False, padding=True, padding_side="right")
    ids, attention = (
        torch.cat([torch.tensor(both[key]) for both in (prompts, solutions)], dim=1).to(student.device)
        for key in ("input_ids", "attention_mask")
    )
    mask = torch.tensor(solutions["attention_mask"]).to(student.device)
    _, _, log_probs = score(student, student, len(tokenizer), ids, attention, mask)
    steps = log_probs.exp().where(mask.cumsum(1) < mask.sum(1, keepdim=True), torch.nan)[:, :-1]  # without the end
    table = pd.DataFrame(steps.tolist(), columns=[f"step_{i + 1}" for i in range(steps.shape[1])])
    table.insert(0, "right", log_probs.sum(1).exp().tolist())
    return table.rename_axis("prompt").reset_index()


def trial(name: str) -> None:
    """Tune one entry of experiments.yaml on validation prompts: results/tuning/NAME.csv.

    Every entry has `trials` trials. The first takes each parameter's `start`; the next ones step from the best so far
    to its neighbours on each ladder (factors of `ladder`). While the best is at an edge, `further` ones go beyond it.
    """
    tuning, (task, default) = experiments.tuning(), sections(PARAMS, "task", "budget")
    storage.check_names(name)
    if name not in tuning["entries"]:
        raise ValueError(f"{EXPERIMENTS} tunes no {name!r}, but {', '.join(tuning['entries'])}.")
    entry, problems = tuning["entries"][name], load_problems(task)["validation"]
    start = tuning["start"] | entry.get("start", {})
    names, tried = list(start), {}
    while len(tried) < tuning["trials"] + tuning["further"]:
        places = sorted(tried, key=lambda place: -tried[place][0]["score"])
        steps = [step for best in places for step in neighbours(best)] or [(0,) * len(names)]
        if len(tried) >= tuning["trials"]:  # to a value of a parameter that no trial has had
            had = [*zip(*tried, strict=True)]
            steps = [
                step for step in neighbours(places[0]) if any(k not in own for k, own in zip(step, had, strict=True))
            ]
        place = next((step for step in steps if step not in tried), None)
        if place is None:
            break
        values = {key: start[key] * tuning["ladder"] ** k for key, k in zip(names, place, strict=True)}
        key = f"{name}-{len(tried)}"
        planned = experiment("tuning", "student", {key: {"method": entry["method"], **entry["fixed"], **values}})
        rows = []
        for seed in tuning["seeds"]:
            train(planned, key, seed, check_fit=False)
            pair = load_trained(planned, key, seed)
            completions, _ = measure(planned, pair, seed, problems, samples=tuning["samples"], greedy=False)
            budget = entry["fixed"].get("budget", default["budget"])
            sampled = with_budget(completions, budget)
            means = {measure: float(sampled[column].mean()) for measure, column in MEASURES.items()}
            rows.append({"trial": len(tried), "seed": seed, **entry["fixed"], **values, **means})
        mean = pd.DataFrame(rows)[[*MEASURES]].mean()
        tried[place] = [row | {"score": score_of(entry, mean, tuning["csr"])} for row in rows]
    path = RESULTS / "tuning" / f"{name}.csv"
    storage.write_table(pd.DataFrame([row for rows in tried.values() for row in rows]), path)
    print(f"{path}: {len(tried)} trials")


def neighbours(place: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The places one step from `place` on the ladders: all parameters down, one after the other, and then up."""
    return [(*place[:i], place[i] + step, *place[i + 1 :]) for step in (-1, 1) for i in range(len(place))]


def score_of(entry: dict, means: pd.Series, csr: float) -> float:
    """What tuning maximises. `accuracy`: the task reward; `closeness`: less cost; `lagrangian`: E[R] - lambda E[C];
    `constrained`: accuracy where the CSR is `csr` or more, and else (below any such) the CSR."""
    if entry["by"] == "constrained":
        return means["accuracy"] if means["csr"] >= csr else means["csr"] - 1
    price = {"accuracy": 0.0, "lagrangian": entry["fixed"].get("lam", 0.0)}.get(entry["by"])
    return -means["cost"] if price is None else means["accuracy"] - price * means["cost"]
