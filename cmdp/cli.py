"""The `cmdp` command: distil, train and measure students, fit them into memory, prune, export and judge them."""

import argparse
import itertools
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path


def distill(words: list[str]) -> None:
    """Distil a teacher into a student on a dataset of your own, and measure both ends (`cmdp distill --help`)."""
    from cmdp import distill
    from cmdp.train import changed, run_all

    options, settings = distill.parse(words)
    experiment = distill.experiment(options, settings)
    for run, seed in itertools.product(experiment.runs, experiment.seeds):
        if other := changed(experiment, run, seed):
            raise ValueError(f"{experiment.folder(run, seed)} was trained with {other}. Give another --output.")
    run_all(experiment, [*experiment.runs], experiment.seeds)
    folder = experiment.folder(run, seed)  # of the last run: the others are measured beside it
    print("sft is the student before training.\n" * options.before, end="")
    print(f"The student is in {folder}: cmdp evaluate {folder}, cmdp export {folder} NEW-FOLDER")


def train(config: Path, overrides: list[str], run: list[str] | None, seed: list[int] | None) -> None:
    """Train and measure the runs of a parameter file; what is finished is not done again."""
    from cmdp.train import read, run_all

    experiment = read(config, *overrides)
    if unknown := sorted(set(run or []) - set(experiment.runs)):
        raise ValueError(f"{config} has no run {unknown[0]!r}. It has: {', '.join(experiment.runs)}.")
    run_all(experiment, run or [*experiment.runs], seed or experiment.seeds)


def evaluate(folder: Path, **changes) -> None:
    """Measure a trained student again, with its teacher, as cmdp.json beside it says."""
    import cmdp.train

    cmdp.train.evaluate(folder, **changes)


def ceiling(folder: Path | None, prompts: int, samples: int, split: str | None, words: list[str]) -> None:
    """What a budget can buy: the accuracy that no method exceeds at a cost, from the teacher's samples, and where the
    student's nats go. For a trained student's folder, or before training with the keys of `cmdp distill`."""
    from importlib.util import find_spec

    from cmdp import ceiling, distill, models, storage, train

    if samples < 2:
        raise ValueError("The ceiling needs --samples 2 or more: its bias is estimated from them.")
    if folder and words:
        raise ValueError(f"{words[0]} does not go with --folder: its cmdp.json says how the student was trained.")
    if folder:
        changes = {"prompts": prompts, "samples": samples, "split": split}
        experiment, run, seed = train.trained(folder, **changes)
        problems = experiment.evaluated(models.shared_tokenizer(folder, experiment.teacher))
        pair, name = train.load_trained(experiment, run, seed, folder), f"ceiling-{run}-{seed}"
    else:
        experiment = distill.experiment(*distill.parse(["--budget", "1", *words]))  # which nothing reads
        experiment.evaluate = train.Evaluation(prompts, samples, experiment.evaluate.batch_size, split or "train")
        roles = experiment.student, experiment.teacher
        problems = experiment.evaluated(models.shared_tokenizer(*roles))
        pair = models.load_pair(*roles, **train.device_settings(experiment.train))
        name = "ceiling"
    prices, found = ceiling.measured(experiment, pair, problems)
    path = train.RESULTS / experiment.name / f"{name}.csv"
    storage.write_table(prices, path)
    storage.write_json(found, path.with_suffix(".json"))
    print(prices.to_string(index=False, float_format="{:.3f}".format))
    print("  ".join(f"{key} {value:.3f}" for key, value in found.items()), "(accuracies, and nats per completion)")
    budget, most = ceiling.suggest(prices), prices["budget"].max()
    bought = f"A budget of {budget:g} nats buys {ceiling.BOUGHT:.0%} of what {most:g} do."
    print(bought if budget else "No budget buys accuracy: the teacher is never right, or always.")
    if find_spec("matplotlib"):
        ceiling.draw(prices, found, path.with_suffix(".png"))
    print(f"{path}, .json{' and .png' if find_spec('matplotlib') else ' (pip install matplotlib draws a figure)'}")


def memory(config: Path, overrides: list[str]) -> None:
    """Sum up what training takes in memory, from the models' configurations alone."""
    from cmdp.train import fit, read

    experiment = read(config, *overrides)
    fit(experiment, next(iter(experiment.runs)))


def prune(model: str, target: Path, without: list[int]) -> None:
    """Make a student of a model's own weights, by leaving out layers."""
    import cmdp.models

    before, after = cmdp.models.prune(model, without, target)
    print(f"{target}: {after:,} parameters of {before:,}")


def export(folder: Path, target: Path, merge: bool) -> None:
    """Export a trained student for use without its teacher and without this package, with a model card."""
    import cmdp.export

    cmdp.export.export(folder, target, merge)
    print(f"{target}: weights, tokenizer and model card")


def judge(a: Path, b: Path, prompt: Path, out: Path, concurrency: int, options: str, **endpoint) -> None:
    """Pairwise reasoning win rate of run A over run B, judged in both orders by a model behind an endpoint."""
    from cmdp import judge
    from cmdp.storage import named

    with named("--options", "takes a JSON object", ValueError):
        endpoint = judge.Endpoint(options=json.loads(options), **endpoint)
    tables = [judge.read_completions(path) for path in (a, b)]
    print(json.dumps(judge.judge(*tables, endpoint, prompt.read_text(encoding="utf-8"), out, concurrency), indent=2))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another
    parser, add = argparse.ArgumentParser(prog="cmdp", description=__doc__), {}
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    functions = {kind.__name__: kind for kind in (distill, train, evaluate, ceiling, memory, prune, export, judge)}
    for name, function in functions.items():
        options = {"help": function.__doc__, "description": function.__doc__, "add_help": name != "distill"}
        add[name] = commands.add_parser(name, **options).add_argument
    for name in ("train", "memory"):
        add[name]("--config", type=Path, required=True, help="a parameter file: profiles/laptop.yaml")
        add[name]("overrides", nargs="*", help="section.field=value, in place of what the file says")
    add["train"]("--run", action="append", help="a run of the file (all); may be given again")
    add["train"]("--seed", action="append", type=int, help="a seed (all of the file's)")
    add["evaluate"]("folder", type=Path, help="a trained student: models/NAME/cmdp-chance/0")
    for name in ("prompts", "samples", "batch_size"):
        add["evaluate"](f"--{name}", type=int, help="as in training unless given")
    add["evaluate"]("--split", help="test, train, ...")
    add["ceiling"]("--folder", type=Path, help="a trained student; else the keys of `cmdp distill`")
    add["ceiling"]("--prompts", type=int, default=100, help="prompts that both models complete")
    add["ceiling"]("--samples", type=int, default=8, help="completions of each")
    add["ceiling"]("--split", help="train before training, test after it, unless given")
    add["prune"]("model", help="a Hub id, a local folder or a GGUF file")
    add["prune"]("target", type=Path, help="a new folder")
    add["prune"]("--without", type=int, nargs="+", required=True, help="layers, counted from 0")
    add["export"]("folder", type=Path, help="a trained student: models/NAME/cmdp-chance/0")
    add["export"]("target", type=Path, help="a new folder")
    add["export"]("--merge", action="store_true", help="merge a LoRA adapter into its base model")
    add["judge"]("a", type=Path, help="completions of run A: a CSV with prompt, completion[, sample]")
    add["judge"]("b", type=Path, help="of run B")
    add["judge"]("--endpoint", dest="url", required=True, help="http://localhost:8000/v1; its key: JUDGE_API_KEY")
    add["judge"]("--model", required=True, help="the judge's name at the endpoint")
    add["judge"]("--out", type=Path, required=True, help="folder of replies, verdicts and summary")
    add["judge"]("--prompt", type=Path, default=Path(__file__).with_name("judge_prompt.txt"))
    add["judge"]("--options", default='{"temperature": 0, "max_tokens": 512}', help="of each request")
    add["judge"]("--timeout", type=float, default=120.0, help="seconds per request")
    add["judge"]("--concurrency", type=int, default=4, help="requests at a time")
    arguments, words = parser.parse_known_args()
    arguments = vars(arguments)
    name = arguments.pop("command")
    if name in ("distill", "ceiling"):  # whose arguments are the fields of dataclasses
        arguments["words"] = words
    elif "overrides" in arguments and not any(word.startswith("-") for word in words):
        arguments["overrides"] += words  # argparse takes those that stand together alone
    elif words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    call(f"cmdp {name}", functions[name], **arguments)


def call(command: str, function, *arguments, **named) -> None:
    """Call the function of a command. What a user can mend ends the process in one line, Ctrl-C or SIGTERM with 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    own = logging.getLogger("bitsandbytes.backends.cpu.ops")  # does without a kernel of the Hub, and says so
    own.addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
    try:
        function(*arguments, **named)
    except KeyboardInterrupt as stopped:
        print(f"{command}: {str(stopped) or 'stopped: the same command goes on'}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        if os.environ.get("CMDP_TRACEBACK"):
            raise
        sys.exit(f"{command}: {error} (CMDP_TRACEBACK=1 shows where)")
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
