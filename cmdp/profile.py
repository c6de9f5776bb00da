"""Experiments on real models: a profile is one parameter file, of which `cmdp` runs any stage.

    cmdp memory --config profiles/colab.yaml
    cmdp data --config profiles/colab.yaml
    cmdp train --config profiles/colab.yaml [RUN] [SEED] [section.field=value ...]
    cmdp evaluate --config profiles/colab.yaml [RUN] [SEED] [section.field=value ...]
    cmdp collect --config profiles/colab.yaml

Without RUN and SEED a stage goes through all of the profile's. What is finished is not done again, and what was
interrupted goes on from its last checkpoint. The profile NAME.yaml keeps its files in problems/NAME, models/NAME and
results/NAME.
"""

import contextlib
import copy
import dataclasses
import gc
import inspect
import json
import os
import shutil
from pathlib import Path

import yaml

from cmdp import runs
from cmdp.memory import GIB, check_memory, device_memory, device_name, memory_sum, peak, taken
from cmdp.methods import method_of
from cmdp.models import ModelSpec, model_spec, pick_device, pick_dtype, shared_tokenizer
from cmdp.storage import checkpoint_folder, parse_yaml, read_yaml, whole, write_json, write_text
from cmdp.tasks import load_task, read_problems

SECTIONS = ("task", "student", "teacher", "budget", "train", "methods", "runs", "seeds", "evaluate")


def run(stage: str, path: Path, words: list[str]) -> None:
    """Run a stage of the profile at `path`; `words` are what the command line says after it.

    Raises:
        ValueError: the profile or the words say something that has no meaning; one line.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    profile = read(path, overrides)
    if stage in ("data", "collect", "memory"):
        if names:
            raise ValueError(f"cmdp {stage} --config takes no {names[0]!r}, only section.field=value.")
        return {"data": data, "collect": collect, "memory": memory}[stage](profile)
    if len(names) > 2 or (len(names) == 2 and not names[1].isdecimal()):
        raise ValueError(f"After the profile come a run and a seed, not {' '.join(names)!r}.")
    for name in names[:1] or profile["methods"]:
        for seed in [int(names[1])] if len(names) == 2 else profile["seeds"]:
            {"train": train, "evaluate": evaluate}[stage](profile, name, seed)
            _free()


def read(path: Path, overrides: list[str]) -> dict:
    """The profile at `path` with `overrides` ("section.field=value", the value as YAML), checked, and its `name`.

    Raises:
        ValueError: a section or field that there is not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no profile at {path}.")
    profile = read_yaml(path)
    for override in overrides:
        keys, _, value = override.partition("=")
        *above, field = keys.split(".")
        section = profile
        for key in above:
            if section is not profile and section.get(key) is None:
                section[key] = {}
            section = section.get(key)
            if not isinstance(section, dict):
                raise ValueError(f"{keys} names no field of {path}: its sections are {', '.join(SECTIONS)}.")
        section[field] = parse_yaml(value)
    if wrong := [*set(SECTIONS) - set(profile), *set(profile) - set(SECTIONS)]:
        raise ValueError(f"{path}: a profile has the sections {', '.join(SECTIONS)}; {wrong[0]!r} is wrong or missing.")
    specs(profile)
    known = _config_fields()
    for name, settings in (("train", profile["train"]), ("budget", profile["budget"]), *profile["runs"].items()):
        if unknown := sorted(set(settings or {}) - known):
            raise ValueError(f"{name}.{unknown[0]} is no field of CMDPConfig.")
    for name in profile["methods"]:
        method_of(name)
    return profile | {"name": path.stem}


def specs(profile: dict) -> tuple[ModelSpec, ModelSpec]:
    """The specs of the profile's student and teacher."""
    return tuple(model_spec(profile[role], role) for role in ("student", "teacher"))


def data(profile: dict) -> None:
    """Read or draw the problems, and write them as the models read them: problems/NAME/SPLIT.jsonl."""
    settings = {key: value for key, value in profile["task"].items() if key not in ("name", "prompt_length")}
    task = load_task(profile["task"]["name"])
    known = inspect.signature(task.problems).parameters
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"task.{unknown[0]} means nothing to the task {profile['task']['name']}.")
    if "tokenizer" in known:  # whose chat template the prompts are written in
        settings["tokenizer"] = shared_tokenizer(*specs(profile))
    splits = task.problems(**settings)
    with whole(Path("problems", profile["name"])) as folder:
        for name, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def memory(profile: dict) -> None:
    """Print what training takes, and raise if the machine has less."""
    device = pick_device(profile["train"].get("use_cpu", False))
    shared_tokenizer(*specs(profile))  # raises if a divergence is not defined
    settings = _train_settings(profile, None, None)
    longest = profile["task"]["prompt_length"]
    available = device_memory(device)
    check_memory(
        memory_sum(*specs(profile), settings, longest, device.type, pick_dtype(device), available),
        available,
    )


def train(profile: dict, run: str, seed: int) -> None:
    """Distil the student by one run's method and seed, into models/NAME/RUN/SEED: its adapter, where it trains one."""
    import torch

    from cmdp import methods
    from cmdp.models import load_pair

    method, name = method_of(run), f"{run}/{seed}"
    settings = _train_settings(profile, run, seed)
    target = Path("models", profile["name"], name)
    problems_file = Path("problems", profile["name"], "train.jsonl")
    problems = read_problems(problems_file)
    student, teacher = specs(profile)
    made_by = {"method": method, "settings": settings, "models": _content(student) + _content(teacher)}
    with _main_process_first(settings.get("use_cpu", False)):
        checkpoints, resume = checkpoint_folder(f"{profile['name']}/{name}", made_by, [problems_file])
    if _finished(checkpoints, target):
        print(f"{target} is finished.")
        return
    device = pick_device(settings.get("use_cpu", False))
    shared_tokenizer(student, teacher)  # raises if a divergence is not defined
    longest, available = profile["task"]["prompt_length"], device_memory(device)
    items = memory_sum(student, teacher, settings, longest, device.type, pick_dtype(device), available)
    check_memory(items, available)
    student, teacher, tokenizer = load_pair(student, teacher, settings.get("use_cpu", False))
    log = []
    if method != "sft":
        task = load_task(profile["task"]["name"])
        problems = within(problems, tokenizer, longest)
        with runs.steps_to(checkpoints / "steps.txt"):
            log = methods.train(
                method,
                student,
                teacher,
                _plain(tokenizer),
                problems,
                task.is_correct,
                checkpoints,
                resume,
                {**_precision(device), **settings},
            )
    if int(os.environ.get("RANK", "0")) > 0:
        return
    results = Path("results", profile["name"])
    runs.write_log(log, results, Path("models", profile["name"], "timing"), name)
    machine = {"device": device_name(device), "threads": torch.get_num_threads()}
    memory = {"summed_gib": peak(items) / GIB, "taken_gib": taken(device) / GIB}
    write_json(machine | memory, results / "memory" / f"{name}.json")
    with whole(target) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _finish(checkpoints)


def evaluate(profile: dict, run: str, seed: int) -> None:
    """Measure one run on held-out problems, into results/NAME."""
    import torch
    from transformers import GenerationConfig

    from cmdp.collect import write_measures
    from cmdp.evaluation import evaluate as measure
    from cmdp.models import load_pair

    settings = profile["evaluate"]
    name = f"{run}/{seed}"
    trained, results = Path("models", profile["name"], name), Path("results", profile["name"])
    if not trained.is_dir():
        raise FileNotFoundError(f"There is no trained student at {trained}: run `cmdp train --config` first.")
    student, teacher = specs(profile)
    if student.trains_adapter:
        student = dataclasses.replace(student, adapter=str(trained), lora=None)
    else:
        student = ModelSpec(str(trained))
    problems_file = Path("problems", profile["name"], f"{settings['split']}.jsonl")
    problems = read_problems(problems_file)[: settings["prompts"]]
    limit = profile["train"]["max_completion_length"]
    made_by = {"settings": settings, "limit": limit, "seed": seed, "models": _content(student) + _content(teacher)}
    inputs = [problems_file, *trained.glob("*.safetensors")]
    mark, _ = checkpoint_folder(f"{profile['name']}/{name}-evaluate", made_by, inputs)
    if _finished(mark, results / "runs" / f"{name}.csv"):
        print(f"{results / 'runs' / name}.csv is finished.")
        return
    use_cpu = profile["train"].get("use_cpu", False)
    device = pick_device(use_cpu)
    student, teacher, tokenizer = load_pair(student, teacher, use_cpu)
    task = load_task(profile["task"]["name"])
    problems = within(problems, tokenizer, profile["task"]["prompt_length"])
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    student.generation_config = GenerationConfig()  # without the top_p or penalties that its makers chat with
    # as in training: float32 weights compute in the device's dtype
    with torch.autocast(device.type, pick_dtype(device), enabled=device.type == "cuda"):
        completions, positions = measure(
            student,
            teacher,
            tokenizer,
            task,
            problems,
            settings["samples"],
            limit,
            settings["batch_size"],
            seed,
        )
    texts = completions.query("decoding == 'sampled'")  # what `cmdp judge` reads
    texts = texts.assign(prompt=[problems[index]["prompt"] for index in texts["prompt"]])[["prompt", "completion"]]
    completions = completions.drop(columns="completion")
    write_measures({"runs": completions, "positions": positions, "texts": texts}, results, run, seed)
    _finish(mark)


def collect(profile: dict) -> None:
    """Gather all runs and seeds into results/NAME: summary, metrics, curves, times, provenance, and the profile that
    they were run with, what the command line said included."""
    from cmdp.collect import collect as gather_all

    results = Path("results", profile["name"])
    gather_all(profile, results, Path("models", profile["name"], "timing"))
    write_text(yaml.safe_dump(profile, sort_keys=False), results / "profile.yaml")


def within(problems: list[dict], tokenizer, longest: int) -> list[dict]:
    """The problems with the token that starts every text in their prompts, less those over `longest` tokens.

    Raises:
        ValueError: none is left.
    """
    prompts = [row["prompt"] for row in problems]
    start = tokenizer.bos_token or ""
    if start and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:  # it starts every text
        prompts = [prompt if prompt.startswith(start) else start + prompt for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
    kept = [
        row | {"prompt": prompt}
        for row, prompt, length in zip(problems, prompts, lengths, strict=True)
        if length <= longest
    ]
    if len(kept) < len(problems):
        print(f"{len(problems) - len(kept)} of {len(problems)} problems are left out: over {longest} tokens.")
    if not kept:
        raise ValueError(f"No problem has {longest} tokens or fewer: raise task.prompt_length.")
    return kept


def _plain(tokenizer):
    """A copy that adds no special tokens to a text, since prompts bring them along: TRL tokenises without saying so."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def _train_settings(profile: dict, run: str | None, seed: int | None) -> dict:
    """What the profile sets of `CMDPConfig`, for one run and seed."""
    own = (profile["runs"] or {}).get(run) or {}
    return {**profile["train"], **profile["budget"], **own, **({} if seed is None else {"seed": seed})}


def _precision(device) -> dict[str, bool]:
    """The trainer's flags for the dtype that `device` computes in."""
    dtype = str(pick_dtype(device))
    return {"bf16": dtype == "torch.bfloat16", "fp16": dtype == "torch.float16"}


def _config_fields() -> set[str]:
    from cmdp.trainer import CMDPConfig

    return {field.name for field in dataclasses.fields(CMDPConfig)} - {"output_dir", "seed"}


def _content(spec: ModelSpec) -> list:
    """What tells one model from another: its spec, and the sizes and dates of its files where they are local."""
    files = [
        [str(path), path.stat().st_size, path.stat().st_mtime]
        for source in (spec.model, spec.adapter or "")
        if source and Path(source).exists()
        for path in sorted(Path(source).glob("*.*") if Path(source).is_dir() else [Path(source)])
    ]
    return [dataclasses.asdict(spec), files]


def _finished(checkpoints: Path, output: Path) -> bool:
    return (checkpoints / "finished.txt").is_file() and output.exists()


def _finish(checkpoints: Path) -> None:
    """Drop the checkpoints, and leave word that what they were for is there."""
    for path in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(path)
    (checkpoints / "finished.txt").write_text("Its outputs are written.\n")


def _main_process_first(use_cpu: bool):
    """Where several processes train together, a context that the first of them goes through before the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return contextlib.nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=use_cpu).main_process_first()


def _free() -> None:
    """Give the memory of a run back before the next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
