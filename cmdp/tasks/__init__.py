"""Tasks: the problems, the task reward, and what counts as valid reasoning.

A task is `arithmetic`, whose problems are generated; a reward on a dataset of one's own: `gsm`, `competition_math`,
`exact`, or `PATH.py:function`; and always a module, or a namespace, with `steps_are_valid(completion, prompt)` and
`is_correct(completion, answer)` or, in TRL's signature, `reward(completions, **columns)`.
"""

import functools
import importlib.util
import inspect
import json
import math
import random
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

from cmdp.storage import one_line

NAMES = {name: name for name in ("arithmetic", "gsm", "competition_math", "exact")}
NAMES |= {"gsm8k": "gsm", "math": "competition_math"}  # as the datasets are called
QUESTIONS = ("prompt", "question", "problem")  # columns that are looked for
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
HUB = {"openai/gsm8k": "main", "EleutherAI/hendrycks_math": SUBJECTS}  # configurations that are read
RESERVED = ("prompts", "completion", "completions", "completion_ids")  # arguments of a reward that are no columns
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_task(name: str) -> ModuleType | SimpleNamespace:
    """The task of a name in `NAMES`, or of the reward function that PATH.py:function names.

    Raises `ValueError` for an unknown name, or a file that does not run or lacks the function, and `FileNotFoundError`
    where there is no such file."""
    (path, _, function), alone = str(name).rpartition(":"), {"steps_are_valid": lambda *_: math.nan}
    if path.endswith(".py"):
        return SimpleNamespace(reward=_own_reward(Path(path), function), files=[Path(path)], **alone)
    if name == "exact":
        return SimpleNamespace(is_correct=lambda text, answer: text.strip() == answer, parse=_stripped, **alone)
    if name not in NAMES:
        raise ValueError(f"The task is one of {', '.join(NAMES)} or PATH.py:function, not {name!r}.")
    return importlib.import_module(f"cmdp.tasks.{NAMES[name]}")


def _own_reward(path: Path, name: str) -> Callable:
    """The function `name` of the file `path`, which is run, as a reward that says in one line what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path} in {Path.cwd()}: name a reward as PATH.py:function.")
    module = _run(path.resolve(), path.read_bytes())
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ValueError(f"{path} has no function {name!r}. It has: {functions or 'none'}.")

    def reward(completions, prompts, completion_ids=None, trainer_state=None, log_extra=None, log_metric=None, **rows):
        try:  # with what training and evaluation both have
            found = [float(value) for value in function(completions=completions, prompts=prompts, **rows)]
        except Exception as error:
            raise ValueError(f"{path}:{name} raised {type(error).__name__}: {one_line(error)}") from error
        if len(found) != len(completions) or not all(0 <= value <= 1 for value in found):
            wrong = [value for value in found if not 0 <= value <= 1][:1]
            given = f"{wrong[0]:g}" if wrong else f"{len(found)} for {len(completions)} completions"
            raise ValueError(f"{path}:{name} returns one reward in [0, 1] for each completion, not {given}.")
        return found

    return reward


@functools.lru_cache(maxsize=8)
def _run(path: Path, content: bytes) -> ModuleType:
    """The module of a file, run once for its `content`. Raises `ValueError` if it does not run."""
    spec = importlib.util.spec_from_file_location(f"cmdp_reward_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look for it
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise ValueError(f"{path} does not run: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _stripped(row: dict) -> dict[str, str]:
    if row.get("answer") is None:
        raise ValueError(f"has no answer in its columns {', '.join(row)}")
    return {"answer": str(row["answer"]).strip(), "solution": ""}


def reward(task) -> Callable[..., list[float]]:
    """The task's reward in TRL's signature, `(completions, prompts, **columns) -> list[float]`."""

    def right(completions, answer, **_) -> list[float]:
        return [float(task.is_correct(*pair)) for pair in zip(completions, answer, strict=True)]

    return getattr(task, "reward", right)


def load_problems(settings: Mapping, tokenizer=None) -> dict[str, list[dict]]:
    """The problems by split. `settings`, the `task` section of a parameter file, has the task's `name` and the
    arguments of its `problems`, or of `from_dataset`. Raises `ValueError` where the name or an argument is unknown, or
    one is missing."""
    task = load_task(settings.get("name"))
    problems = getattr(task, "problems", None) or functools.partial(from_dataset, task)
    signature = inspect.signature(problems)
    arguments = {key: value for key, value in settings.items() if key not in ("name", "prompt_length")}
    arguments |= {"tokenizer": tokenizer} if "tokenizer" in signature.parameters else {}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        valid = ", ".join(name for name in signature.parameters if name != "tokenizer")
        raise ValueError(f"Settings of task {settings['name']!r} are {valid}: {error}.") from error
    return problems(**arguments)


def from_dataset(
    task,
    source: str | Path,
    sizes: Mapping[str, int | None],
    seed: int,
    test: str | Path | None = None,
    tokenizer=None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    instruction: str | None = None,
    chat_template_kwargs: dict | None = None,
) -> dict[str, list[dict]]:
    """Disjoint splits of `sizes` problems (see `cut`), each a row of `prompt`, `answer` and `solution`, or for a reward
    function of one's own of `prompt` and the dataset's columns.

    Args:
        source: what `read` reads; or, in its place, what the task generates by this name in `GENERATED`.
        test: where the test split comes from, if elsewhere.
        prompt_column: the first of `QUESTIONS` that there is, unless given. A list of messages goes through the chat
            template, and text in `prompt` is taken as it stands. Text in any other column is a question: with the
            instruction, the user's turn of the template, or plain text if the tokenizer has none.
        answer_column: takes the place of `answer`.
        instruction: takes the place of the task's.

    Raises `ValueError` where a row lacks a column or has no valid answer, and what `read` and `cut` raise.
    """

    def prompt(question: str | list, column: str) -> str:
        asked = getattr(task, "INSTRUCTION", None) if instruction is None and column != "prompt" else instruction
        if isinstance(question, str) and column == "prompt" and not asked:
            return question
        if isinstance(question, str):
            question = question.strip()
            messages = [{"role": "user", "content": f"{question}\n\n{asked}" if asked else question}]
        else:
            messages = question
        if getattr(tokenizer, "chat_template", None):
            options = {"tokenize": False, "add_generation_prompt": True, **(chat_template_kwargs or {})}
            return tokenizer.apply_chat_template(messages, **options)
        if isinstance(question, list):
            raise ValueError("the prompt is a list of messages, and the tokenizer has no chat template")
        return f"{asked}\n\nQuestion: {question}\nAnswer:" if asked else question

    def problems(where: str, rows: list[dict]) -> list[dict]:
        found, columns = [], [*rows[0]] if rows else []
        column = prompt_column or next((name for name in QUESTIONS if name in columns), QUESTIONS[0])
        if missing := [name for name in (column, answer_column) if name and name not in columns]:
            has, name = ", ".join(columns) or "no rows", "prompt" if column in missing else "answer"
            raise ValueError(f"{where} has no column {missing[0]!r}. It has: {has}. Name yours by --{name}_column.")
        for number, row in enumerate(rows, 1):
            try:
                if not row[column] or not isinstance(row[column], (str, list)):
                    raise ValueError(f"has no text in {column!r}")
                row |= {"answer": row[answer_column]} if answer_column else {}
                own = {name: value for name, value in row.items() if name not in RESERVED}
                parsed = task.parse(row) if hasattr(task, "parse") else own
                found.append({**parsed, "prompt": prompt(row[column], column)})
            except Exception as error:  # a chat template may raise its own
                raise ValueError(f"{where}, row {number}: {one_line(error)}.") from error
        return found

    if source in getattr(task, "GENERATED", {}):
        splits, asked = task.GENERATED[source](sizes, seed).items(), "question"
        return {name: [row | {"prompt": prompt(row.pop(asked), asked)} for row in rows] for name, rows in splits}
    data = read(source)
    held_out = read(test) if test else data
    name = next(
        (name for name in ("test", "validation", "train") if name in held_out and (test or name != "train")), ""
    )
    train = problems(f"{source} (train)", data.get("train", []))
    return cut(train, problems(f"{test or source} ({name})", held_out[name]) if name else [], sizes, seed)


def read(source: str | Path) -> dict[str, list[dict]]:
    """The rows of a dataset by split: of a file (`FILES`), which is a train split; of a folder with train.jsonl and
    test.jsonl, or train-*.parquet and the like; or of a dataset on the Hub, as NAME or NAME:CONFIGURATION.

    Raises `FileNotFoundError` where there is no such file, or the dataset is neither cached nor reachable, and
    `ValueError` where a file cannot be read."""
    import datasets

    path, (name, _, configuration) = Path(source), str(source).partition(":")
    names = configuration or HUB.get(name, "default")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if path.exists():
        return {split: _read_files(files) for split, files in _files(path).items()}
    try:
        parts = [datasets.load_dataset(name, None if each == "default" else each) for each in names.split()]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = f"{source} is no file or folder here, nor cached or reachable on the Hub ({one_line(error)})"
        hint = "unset HF_HUB_OFFLINE to download it, or give a folder with train.jsonl"
        raise FileNotFoundError(f"{said}: {hint}.") from error
    return {split: [row for part in parts for row in part[split].to_list()] for split in parts[0]}


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of a dataset on this machine, by split: those of one kind."""
    splits = {"train": [path]} if path.is_file() else {}
    for split in ("train", "test", "validation") if path.is_dir() else ():
        files = [file for file in sorted(path.glob(f"{split}[.-]*")) if file.suffix in FILES]
        splits |= {split: [file for file in files if file.suffix == files[0].suffix]} if files else {}
    if not splits or (path.is_file() and path.suffix not in FILES):
        raise ValueError(f"{path} is no dataset: a file ends in {', '.join(FILES)}, and a folder has train.jsonl, say.")
    return splits


def _read_files(files: list[Path]) -> list[dict]:
    """Rows of the same columns. JSON is read by `json` and CSV as text, so that answers stay as they are written: the
    builders of `datasets` make 3 to 3.0 beside 0.5, 007 to 7, and dates to times."""
    import pandas as pd
    from datasets import load_dataset

    kind, rows, fault = FILES[files[0].suffix], [], f"{files[0]} is empty or malformed"
    try:
        if kind == "parquet":
            return load_dataset(kind, data_files=[*map(str, files)], split="train").to_list()
        for file in files:
            if kind == "csv":
                table = pd.read_csv(file, dtype=str, keep_default_na=False, na_values=[""])
                rows += table.astype(object).where(table.notna(), None).to_dict("records")
                continue
            whole = file.read_text(encoding="utf-8-sig")
            lines = [whole] if whole.lstrip().startswith("[") else whole.split("\n")
            for number, line in [each for each in enumerate(lines, 1) if each[1].strip()]:
                fault = f"{file}, line {number}, is no JSON object"
                found = json.loads(line)
                rows += map(dict, found if line is whole and isinstance(found, list) else [found])
    except Exception as error:  # the builders raise what their readers do, and StopIteration for an empty file
        raise ValueError(f"{fault}: {one_line(error.__cause__ or error)}") from error
    if not rows:
        raise ValueError(f"{fault}.")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


def cut(train: list[dict], test: list[dict], sizes: Mapping[str, int | None], seed: int) -> dict[str, list[dict]]:
    """Disjoint splits: "test" from the head of `test`, all others from `train`, shuffled by `seed`, in the order of
    `sizes`; None takes all that is left. Where `test` is empty, "test" is cut from `train` too, and None takes a tenth.
    A prompt is kept once, and not in `train` if `test` has it. Raises `ValueError` where there are too few problems."""
    tests, pool = {}, {}
    for row in test:
        tests.setdefault(key(row["prompt"]), row)
    for row in train:
        if (prompt := key(row["prompt"])) not in tests:
            pool.setdefault(prompt, row)
    held_out, rest, splits = list(tests.values()), list(pool.values()), {}
    random.Random(seed).shuffle(rest)
    for name, size in sizes.items():
        left = held_out if name == "test" and test else rest
        if size is None:
            size = len(left) if left is held_out or name != "test" else max(1, len(left) // 10)
        if size > len(left) or not left:
            raise ValueError(f"There are {len(left)} problems left for {name!r}, and {size or 'some'} were asked for.")
        splits[name] = left[:size]
        del left[:size]
    return splits


def key(prompt: str) -> str:
    """What identifies a prompt: its words, numbers and signs, whatever its case, punctuation and white space."""
    return " ".join(re.findall(r"\w+|[^\w\s,;:!?'\"]", prompt.lower())) or prompt
