"""One way to train, for a parameter file, a pipeline stage and a notebook.

An experiment is one parameter file: a task, a student, a teacher, a budget, settings of the trainer, and named runs,
each a method with settings of its own. `cmdp train --config profiles/laptop.yaml` trains and measures all of its runs:
students go to models/NAME/RUN/SEED, results to results/NAME. Finished runs are not repeated; interrupted ones resume.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cmdp import storage
from cmdp.methods import METHODS, START, TRL, check_method
from cmdp.models import ModelSpec, check_specs, load_pair, pick_device, pick_dtype, shared_tokenizer, tokenise
from cmdp.statistics import summarise
from cmdp.tasks import load_problems, load_task, reward

MODELS, RESULTS = Path("models"), Path("results")
TRAINING = "training.csv"  # the log, beside a trained student's weights
PHASES = ("time/generation", "time/scoring", "time/update")  # of a step, seconds
LOGGED = (  # columns of a training log that depend on the seed alone
    *("step", "task_reward", "modified_reward", "csr", "cost/mean", "cost/q50", "cost/q90", "kl_per_token"),
    *("remaining_budget", "over_budget_tokens", "lambda", "entropy", "completions/mean_length"),
    *("loss/policy", "loss/single_step", "grad_norm"),
)


@dataclass
class Budget:
    """The budget d: nats per trajectory (`total`) or per token (`per_token`)."""

    budget: float
    budget_form: str = "total"


@dataclass
class Evaluation:
    """What is measured of a trained student: `samples` completions of each of the first `prompts` of `split`."""

    prompts: int
    samples: int
    batch_size: int
    split: str = "test"
    greedy: bool = True

    def __post_init__(self):
        if min(self.prompts, self.samples, self.batch_size) < 1:
            raise ValueError("prompts, samples and batch_size of an evaluation are 1 or more.")


@dataclass
class Experiment:
    """A parameter file. `train` holds fields of `CMDPConfig`; so does each run, beside its `method`."""

    name: str
    task: dict[str, Any]
    student: ModelSpec
    teacher: ModelSpec
    budget: Budget
    train: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    seeds: list[int]
    evaluate: Evaluation

    def __post_init__(self):
        storage.check_names(self.name, *self.runs)

    def settings(self, run: str, seed: int) -> dict[str, Any]:
        """The fields of `CMDPConfig` that a run is trained with, beside the precision of the device."""
        own = {key: value for key, value in self.runs[run].items() if key != "method"}
        method = METHODS.get(self.runs[run]["method"], {})
        return {**method, **self.train, **dataclasses.asdict(self.budget), **own, "seed": seed}

    def folder(self, run: str, seed: int) -> Path:
        """Where the trained student goes."""
        return MODELS / self.name / run / str(seed)

    def problems(self, split: str, tokenizer) -> list[dict]:
        """The problems of a split whose prompts have at most `task.prompt_length` tokens. Raises `ValueError` if there
        is no such split, none is left, or the reward of the first cannot be computed."""
        splits, longest = load_problems(self.task, tokenizer), self.task.get("prompt_length")
        if split not in splits:
            raise ValueError(f"There is no split {split!r}. There are: {', '.join(splits)}.")
        problems = splits[split]
        lengths = map(len, tokenise(tokenizer, [row["prompt"] for row in problems]))
        kept = [row for row, length in zip(problems, lengths, strict=True) if longest is None or length <= longest]
        if len(kept) < len(problems):
            print(f"{len(problems) - len(kept)} of {len(problems)} problems are left out: over {longest} tokens.")
        if not kept:
            raise ValueError(f"No problem has {longest} tokens or fewer: raise task.prompt_length.")
        first = {key: [value] for key, value in kept[0].items()}
        reward(load_task(self.task["name"]))([""], prompts=first.pop("prompt"), **first)  # raises what it raises
        return kept

    def evaluated(self, tokenizer) -> list[dict]:
        """The problems that its `evaluate` section asks for. Raises `ValueError` as `problems` does."""
        return self.problems(self.evaluate.split, tokenizer)[: self.evaluate.prompts]


def read(path: Path, *overrides: str) -> Experiment:
    """The experiment in a parameter file, with `overrides` such as "train.max_steps=5", checked. Its name, and so its
    folders, are the file's unless `name` says another.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown section, field, method or task, or a value of the wrong type or range; one line.
    """
    return build({"name": path.stem} | storage.read_yaml(path, *overrides), str(path))


def build(content: dict[str, Any], path: str) -> Experiment:
    """The experiment of a parameter file's `content`, checked. Raises `ValueError` as `read` does, naming `path`."""
    try:
        experiment = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Experiment), content))
    except OmegaConfBaseException as error:
        said = str(error.msg or error).partition("\n")[0]
        raise ValueError(f"{path}: {error.full_key or 'the file'}: {said}") from error
    check_specs(experiment.student, experiment.teacher)
    load_task(str(experiment.task.get("name")))
    for run, row in experiment.runs.items():
        if check_method(row.get("method", f"(none, in runs.{run})")) == START:
            continue  # it is not trained
        try:
            config = build_config(experiment.settings(run, 0) | {"bf16": False, "fp16": False, "use_cpu": True})
            check_trackers(config.report_to)
        except ValueError as error:
            raise ValueError(f"{path}, run {run}: {error}") from error
    return experiment


def check_trackers(names: list[str]) -> None:
    """Raise `ValueError` for a tracker (`report_to`) that is unknown or not installed."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    for name in {*names} - {"none", *get_available_reporting_integrations()}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to knows no tracker {name!r}: {', '.join(INTEGRATION_TO_CALLBACK)}.")
        raise ValueError(f"The tracker {name} is not installed: pip install {name}.")


def check_machine(settings: dict[str, Any], *folders: Path) -> None:
    """Raise `ValueError` where a GPU is asked for (use_cpu=false, or bf16, fp16 or use_vllm without use_cpu) and there
    is none, or one of `folders` cannot be written. 4-bit weights run on a CPU too, slowly."""
    import torch

    asked = [name for name in ("bf16", "fp16", "use_vllm") if settings.get(name) and not settings.get("use_cpu")]
    asked += ["use_cpu=false"] if settings.get("use_cpu") is False else []
    if asked and not torch.cuda.is_available():
        raise ValueError(f"{asked[0]} asks for a GPU and PyTorch finds none: leave it out, or set use_cpu=true.")
    for folder in folders:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            raise ValueError(f"{folder} cannot be written ({parent}: {error.strerror}): choose another.") from error


def device_settings(settings: dict[str, Any]) -> dict[str, bool]:
    """What of a trainer's settings says where models are held, and in which dtype: the arguments of `load_pair`."""
    return {name: bool(settings.get(name)) for name in ("use_cpu", "bf16")}


def arguments(*kinds: type):
    """A parser of command lines for the fields of dataclasses, which raises `ValueError`."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str):
            raise ValueError(message)

    parser = Parser(kinds, allow_abbrev=False)
    for action in parser._actions:
        if getattr(action.type, "__name__", "") == "string_to_bool":  # also bf16, whose default is None
            action.nargs, action.const = "?", True
    return parser


def build_config(settings: dict[str, Any]):
    """The `CMDPConfig` of `settings`, values converted to the fields' types. Raises `ValueError` for an unknown field,
    or a value that does not convert or is out of range."""
    from cmdp.trainer import CMDPConfig

    words = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    parser = arguments(CMDPConfig)
    config, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"{unknown[0].partition('=')[0].lstrip('-')} is no field of CMDPConfig.")
    return config


def distil(
    method: str, student, teacher, tokenizer, problems, task_reward, checkpoints, resume, settings
) -> list[dict]:
    """Distil `teacher` into `student`, in place, by a method.

    Args:
        problems: training prompts, rows with `prompt` and the columns that the task reward takes.
        task_reward: the task reward in TRL's signature, see `tasks.reward`.
        checkpoints, resume: the folder of checkpoints, and whether to go on from the last of them.
        settings: fields of `CMDPConfig`; they take precedence over the method's own.

    Returns:
        The log: a dict per step.
    """
    from datasets import Dataset
    from transformers.utils.import_utils import is_in_notebook
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    from cmdp.trainer import CMDPTrainer

    defaults = {"gradient_checkpointing": False, "bf16": False, "report_to": "none", "disable_tqdm": True}
    defaults["dataloader_pin_memory"] = student.device.type == "cuda"  # PyTorch warns where there is no GPU to pin for
    settings = {"output_dir": str(checkpoints), **defaults, **METHODS.get(check_method(method), {}), **settings}
    config, data = build_config(settings), {"train_dataset": Dataset.from_list(problems), "processing_class": tokenizer}
    if method in TRL:  # given what of the settings they know: reverse KL, no KL to a reference
        kind = GRPOConfig if method == "trl-grpo" else DistillationConfig
        known = {entry.name for entry in dataclasses.fields(kind)} - {"beta"}
        config = kind(**{name: getattr(config, name) for name in settings if name in known})
    if method == "trl-grpo":
        trainer = GRPOTrainer(student, task_reward, config, **data)
    elif method == "trl-gkd":
        trainer = DistillationTrainer(student, teacher, args=config, **data)
    else:
        trainer = CMDPTrainer(student, teacher, task_reward, config, **data)
    if method in TRL:  # which would start a text twice that brings BOS along
        trainer._tokenize_prompts = lambda prompts: (tokenise(tokenizer, prompts), None, {})
    if trainer.is_world_process_zero() and (is_in_notebook() or sys.stderr.isatty()):
        trainer.add_callback(_progress_bar())
    return run_trainer(trainer, resume)


def _progress_bar():
    """A callback that shows steps, the time left, CSR and task reward."""
    from transformers.trainer_callback import ProgressCallback, tqdm

    class Bar(ProgressCallback):
        def on_train_begin(self, args, state, control, **_):
            self.current_step = state.global_step
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training")

        def on_log(self, args, state, control, logs, **_):
            self.training_bar.set_postfix({x: f"{logs[x]:.3f}" for x in ("csr", "task_reward") if x in logs})

    return Bar()


def run_trainer(trainer, resume: bool) -> list[dict]:
    """Train, and return the log, whose `seconds` of training add up over resumes. Checkpoints are certified as they are
    written, never between steps that share a rollout, which a checkpoint lacks. On SIGTERM or Ctrl-C of any process all
    stop at the next step that can have one, with one, and raise `KeyboardInterrupt`; a second signal stops at once.
    The second step says how long the others will take."""
    import torch
    from transformers import TrainerCallback, TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    class Keeper(TrainerCallback):
        signals = stopped = due = False

        def stop(self, *_):
            if self.signals:
                raise KeyboardInterrupt("stopped at once: the same command resumes from the last checkpoint")
            self.signals = True

        def on_train_begin(self, args, state, control, **_):
            self.start = time.monotonic() - max((entry["seconds"] for entry in state.log_history), default=0.0)
            self.timed, self.last = state.global_step + 2, 0.0

        def on_log(self, args, state, control, logs, **_):
            state.log_history[-1]["seconds"] = time.monotonic() - self.start
            if "train_runtime" in logs:  # a summary of this part alone
                state.log_history.pop()
            if len(state.log_history) == 10 < state.max_steps or "train_runtime" in logs:  # early, and at the end
                nothing_to_learn(args, state)

        def on_step_end(self, args, state, control, **_):
            self.stopped = self.signals
            if args.world_size > 1:  # the processes stop at the same step
                signals = torch.tensor(int(self.signals), device=args.device)
                torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
                self.stopped = bool(signals)
            rollout = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
            between = state.global_step * args.gradient_accumulation_steps % rollout == 0
            self.due |= control.should_save or self.stopped
            control.should_save = self.due and (between or state.global_step >= state.max_steps)
            self.due &= not control.should_save
            control.should_training_stop |= self.stopped and control.should_save
            before, self.last = self.last, time.monotonic()
            if state.global_step == self.timed and state.is_world_process_zero:
                step, left = self.last - before, state.max_steps - state.global_step
                print(f"{step:.2g} s per step: {step * left / 60:.0f} min for the rest of this run.", file=sys.stderr)

        def on_save(self, args, state, control, **_):
            args.distributed_state.wait_for_everyone()  # until each has written its part
            if state.is_world_process_zero:
                storage.certify(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    last, keeper, before = get_last_checkpoint(trainer.args.output_dir) if resume else None, Keeper(), {}
    if last and (state := TrainerState.load_from_json(f"{last}/trainer_state.json")).global_step >= state.max_steps:
        trainer._load_from_checkpoint(last)  # finished: `train` would take one more step
        return state.log_history
    trainer.add_callback(keeper)
    trainer._save_checkpoint = storage.named(trainer.args.output_dir)(trainer._save_checkpoint)
    if trainer.args.save_total_limit == 1:
        trainer.args.save_total_limit = 2  # the one before serves until the new one is certified
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, keeper.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if keeper.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}: the same command resumes there")
    return trainer.state.log_history


def nothing_to_learn(args, state) -> None:
    """Say so if in every step logged so far all completions of a prompt earned the same, and the reward counts."""
    equal = [row["frac_reward_zero_std"] for row in state.log_history if "frac_reward_zero_std" in row]
    if equal and min(equal) == 1 and getattr(args, "task_weight", 1) and state.is_world_process_zero:
        said = "all completions of a prompt earned the same reward: it taught nothing. Is it the right one?"
        print(f"In {state.global_step} steps {said}", file=sys.stderr)


def train(experiment: Experiment, run: str, seed: int, check_fit: bool = True) -> Path:
    """Train one run with one seed, unless that is done.

    Args:
        check_fit: first print the memory that training takes, and raise if the device has less.

    Returns:
        The student's folder: weights (an adapter alone, where it trains one), tokenizer, the log in `training.csv`, and
        `cmdp.json` (what it was trained with, and on).

    Raises:
        ValueError: different vocabularies, no prompt short enough, or too little memory.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import set_seed

    from cmdp.memory import GIB, taken

    storage.check_names(str(seed))
    method, settings = experiment.runs[run]["method"], experiment.settings(run, seed)
    folder, where = experiment.folder(run, seed), device_settings(settings)
    specs, name = (experiment.student, experiment.teacher), f"{experiment.name}/{run}/{seed}"
    check_machine(settings, folder, storage.CHECKPOINTS)
    problems, task = experiment.problems("train", shared_tokenizer(*specs)), load_task(experiment.task["name"])
    files = [file for spec in specs for file in spec.files()] + getattr(task, "files", [])
    made_from = {"method": method, "settings": settings if method != START else {}, "reward": experiment.task["name"]}
    made_by = storage.fingerprint(made_from | {"problems": problems, "models": [*map(vars, specs)]}, files)
    if (folder / storage.RECORD).is_file():
        if storage.read_record(folder).get("fingerprint") == made_by:
            print(f"{folder} is finished.")
            storage.drop(storage.CHECKPOINTS / name)  # of a run that was killed before it did
            return folder
        print(f"{folder} was trained with {changed(experiment, run, seed) or 'other inputs or code'}: it is replaced.")
    main, together = int(os.environ.get("RANK", "0")) == 0, int(os.environ.get("WORLD_SIZE", "1")) > 1
    with storage.locked(name) if main else contextlib.nullcontext():
        with PartialState(cpu=where["use_cpu"]).main_process_first() if together else contextlib.nullcontext():
            checkpoints, resume = storage.checkpoint_folder(name, made_by)
        memory = fit(experiment, run) if check_fit else {}
        set_seed(seed)  # a new adapter's weights are drawn
        student, teacher, tokenizer = load_pair(*specs, **where)
        device, dtype, log = student.device, pick_dtype(student.device, where["bf16"]), []
        if method != START:
            settings |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}  # a T4 has no bfloat16
            with steps_to(checkpoints / "steps.txt"):
                log = distil(method, student, teacher, tokenizer, problems, reward(task), checkpoints, resume, settings)
        if not main:
            return folder
        record = {"run": run, "method": method, "seed": seed, "settings": settings, "task": experiment.task}
        record |= {"student": specs[0].model, "gguf_file": specs[0].gguf_file, "revision": specs[0].revision}
        record |= {"student_adapter": specs[0].adapter, "teacher_adapter": specs[1].adapter}
        record |= {"teacher": specs[1].model, "parameters": student.num_parameters()}
        record |= {"memory": memory and memory | {"taken_gib": taken(device) / GIB}, "provenance": storage.provenance()}
        record |= {"experiment": dataclasses.asdict(experiment), "fingerprint": made_by, "measured": None}
        with storage.whole(folder) as unfinished, storage.named(folder):
            student.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            storage.write_table(pd.DataFrame(log or {"step": []}).sort_index(axis=1), unfinished / TRAINING)
            storage.write_json(record, unfinished / storage.RECORD)
            if (checkpoints / "runs").is_dir():  # TensorBoard's
                (checkpoints / "runs").rename(unfinished / "runs")
        storage.drop(checkpoints)
    return folder


def changed(experiment: Experiment, run: str, seed: int) -> str:
    """What the student in a run's folder was trained with and `experiment` does not say: "budget.budget=2.0, not 1.0";
    "" where there is no such student, or nothing. What is measured of it does not count."""
    if not (path := experiment.folder(run, seed) / storage.RECORD).is_file():
        return ""
    names = ["student", "teacher", "task", *["budget", "train"] * (experiment.runs[run]["method"] != START)]
    both = storage.read(path)["experiment"], dataclasses.asdict(experiment)
    both = ({name: said[name] for name in names} | {"runs": said["runs"][run]} for said in both)
    old, new = (pd.json_normalize(said, max_level=1).iloc[0].map(str).to_dict() for said in both)
    return next((f"{x}={old.get(x)}, not {new.get(x)}" for x in old | new if old.get(x) != new.get(x)), "")


def fit(experiment: Experiment, run: str) -> dict[str, Any]:
    """Print the memory that training a run takes, from the models' configurations alone, and raise `ValueError` if the
    device has less. Returns what a record says of it."""
    import torch

    from cmdp.memory import GIB, check_memory, device_memory, device_name, memory_sum, peak, reset_peak

    settings, specs = experiment.settings(run, 0), (experiment.student, experiment.teacher)
    shared_tokenizer(*specs)  # raises if no divergence is defined
    device = pick_device(settings.get("use_cpu", False))
    dtype = pick_dtype(device, settings.get("bf16", False))
    if not (longest := experiment.task.get("prompt_length")):
        raise ValueError("task.prompt_length is missing: memory is summed for prompts of so many tokens.")
    reset_peak(device)
    available = device_memory(device)
    items = memory_sum(*specs, settings, longest, device.type, dtype, available)
    check_memory(items, available)
    return {"device": device_name(device), "threads": torch.get_num_threads(), "summed_gib": peak(items) / GIB}


def load_trained(experiment: Experiment, run: str, seed: int, folder: Path | None = None) -> tuple:
    """(student, teacher, tokenizer) of a trained run, saved in its own folder unless in `folder`. Raises
    `FileNotFoundError` if it has not been trained."""
    folder, student = folder or experiment.folder(run, seed), experiment.student
    storage.read_record(folder)
    adapted = dataclasses.replace(student, adapter=str(folder), lora=None)
    student = adapted if student.trains_adapter else ModelSpec(str(folder))
    return load_pair(student, experiment.teacher, **device_settings(experiment.train))


def measure(experiment: Experiment, pair: tuple, seed: int, problems: list[dict], **changes) -> tuple:
    """(completions, positions) of one (student, teacher, tokenizer) on `problems`, as `evaluation.evaluate` gives them.
    `changes` are of its arguments `samples`, `max_completion_length`, `greedy`."""
    import torch

    from cmdp.evaluation import evaluate

    settings, device, task = experiment.evaluate, pair[0].device, load_task(experiment.task["name"])
    arguments = {"samples": settings.samples, "greedy": settings.greedy, "batch_size": settings.batch_size}
    arguments["max_completion_length"] = experiment.train.get("max_completion_length", 256)
    dtype = pick_dtype(device, experiment.train.get("bf16", False))
    # as in training: float32 weights compute in the device's dtype
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return evaluate(*pair, task, problems, seed=seed, **arguments | changes)


def run_all(experiment: Experiment, runs: list[str], seeds: list[int]) -> None:
    """Train and measure `runs` with `seeds`, and sum up all results there are in results/NAME."""
    from cmdp.memory import release

    results, every = RESULTS / experiment.name, [(run, seed) for run in runs for seed in seeds]
    if int(os.environ.get("RANK", "0")):  # the first process measures
        for each in every:
            train(experiment, *each)
        return
    check_machine({}, results)
    problems = experiment.evaluated(shared_tokenizer(experiment.student, experiment.teacher))
    asked = [problems, experiment.evaluate, experiment.budget, experiment.train.get("max_completion_length")]
    for place, (run, seed) in enumerate(every, 1):
        print(f"Run {place} of {len(every)}: {run}, seed {seed}")
        folder = train(experiment, run, seed)
        release()  # its models, which no name holds
        record = storage.read_record(folder)
        measured_by = storage.fingerprint({"asked": asked, "student": record["fingerprint"]}, [])
        if record.get("measured_by") == measured_by and (results / "completions" / run / f"{seed}.csv").is_file():
            continue
        completions, positions = measure(experiment, load_trained(experiment, run, seed), seed, problems)
        release()
        texts = completions.query("decoding == 'sampled'")[["prompt", "completion"]]
        texts = texts.assign(prompt=[problems[index]["prompt"] for index in texts["prompt"]])  # what `judge` reads
        training = storage.read(folder / TRAINING).reindex(columns=[*LOGGED, *PHASES]).dropna(subset="csr")
        tables = {"completions": completions.drop(columns="completion"), "positions": positions, "texts": texts}
        for name, table in (tables | {"training": training}).items():
            table = table.assign(run=run, seed=seed)
            storage.write_table(table[["run", "seed", *table.columns[:-2]]], results / name / run / f"{seed}.csv")
        summary = summarise(tables["completions"].assign(run=run, seed=seed), **vars(experiment.budget))
        called = summary.set_index("measure")[["mean", "low", "high"]].rename(named_by(completions))
        record["measured"] = called.to_dict("index")
        record["measured"] |= {"prompts": completions["prompt"].nunique(), "seeds": 1}
        record |= {"measured_by": measured_by, "experiment": dataclasses.asdict(experiment)}
        record["settings"] |= experiment.settings(run, seed)  # of a student before training: the budget, say
        storage.write_json(record["memory"], results / "memory" / run / f"{seed}.json")
        storage.write_json(record, folder / storage.RECORD)
        print(f"{run}, seed {seed}: weights in {folder}, completions in {results}/completions/{run}/{seed}.csv")
    completions = storage.read_runs(results / "completions")
    summary = summarise(completions, **vars(experiment.budget))
    means = summary.pivot(index="run", columns="measure", values="mean")[["accuracy", "csr", "cost", "kl_per_token"]]
    storage.write_table(summary, results / "summary.csv")
    times = storage.read_runs(results / "training").reindex(columns=["run", *PHASES])
    times = times.groupby("run", sort=False).median()
    storage.write_table(times.reset_index(), results / "timing.csv")
    storage.write_json(storage.provenance() | {"device": record["memory"]["device"]}, results / "provenance.json")
    storage.write_text(yaml.safe_dump(dataclasses.asdict(experiment), sort_keys=False), results / "profile.yaml")
    print(f"Summary of {summary['run'].nunique()} runs: {results}/summary.csv\n{shown(means, completions)}")


def trained(folder: Path, **changes) -> tuple[Experiment, str, int]:
    """(experiment, run, seed) of the trained student in `folder`, from what cmdp.json beside it says. `changes` are
    fields of `Evaluation`, None for those to leave. Raises `FileNotFoundError` if there is no such student."""
    record = storage.read_record(folder)
    content = record["experiment"]
    content["evaluate"] |= {name: value for name, value in changes.items() if value is not None}
    return build(content, str(folder / storage.RECORD)), record["run"], record["seed"]


def evaluate(folder: Path, **changes) -> pd.DataFrame:
    """Measure a trained student again, see `trained`. Prints and returns the means, as `summarise`. Raises `ValueError`
    for a split that there is not."""
    experiment, run, seed = trained(folder, **changes)
    problems = experiment.evaluated(shared_tokenizer(folder, experiment.teacher))  # raises before weights are read
    completions, _ = measure(experiment, load_trained(experiment, run, seed, folder), seed, problems)
    summary = summarise(completions.assign(run=run, seed=seed), **vars(experiment.budget))
    print(shown(summary.drop(columns=["run", "seeds"]).set_index("measure"), completions))
    return summary


def named_by(completions: pd.DataFrame):
    """What a measure is called: accuracy is mean_reward, unless every reward is 0 or 1."""
    word = "accuracy" if completions["correct"].isin([0, 1]).all() else "mean_reward"
    return lambda measure: measure.replace("accuracy", word)


def shown(table: pd.DataFrame, completions: pd.DataFrame) -> str:
    """A table as it is printed."""
    name = named_by(completions)
    return table.rename(index=name, columns=name).to_string(float_format="{:.3f}".format)


@contextlib.contextmanager
def steps_to(path: Path):
    """Send what a trainer prints, a line per step, to a file beside its checkpoints: `tail -f` follows it."""
    print(f"Training: steps are logged to {path}", flush=True)
    with open(path, "a", buffering=1, encoding="utf-8") as lines, contextlib.redirect_stdout(lines):
        yield
