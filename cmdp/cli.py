"""The `cmdp` command: train and measure students, fit them into memory, prune, export and judge them."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path


def train(arguments: argparse.Namespace) -> None:
    """Train and measure the runs of a parameter file; what is finished is not done again."""
    from cmdp import train as room

    experiment = room.read(arguments.config, *arguments.overrides)
    if unknown := sorted(set(arguments.run or []) - set(experiment.runs)):
        raise ValueError(f"{arguments.config} has no run {unknown[0]!r}. It has: {', '.join(experiment.runs)}.")
    room.run_all(experiment, arguments.run or [*experiment.runs], arguments.seed or experiment.seeds)


def memory(arguments: argparse.Namespace) -> None:
    """Sum up what training takes in memory, from the models' configurations alone."""
    from cmdp import train as room

    experiment = room.read(arguments.config, *arguments.overrides)
    room.fit(experiment, next(iter(experiment.runs)))


def prune(arguments: argparse.Namespace) -> None:
    """Make a student of a model's own weights, by leaving out layers."""
    from cmdp.models import prune as leave_out

    before, after = leave_out(arguments.model, arguments.without, arguments.target)
    print(f"{arguments.target}: {after:,} parameters of {before:,}")


def export(arguments: argparse.Namespace) -> None:
    """Export a trained student for use without its teacher and without this package, with a model card."""
    from cmdp.export import export as write

    write(arguments.folder, arguments.target, arguments.merge)
    print(f"{arguments.target}: weights, tokenizer and model card")


def judge(arguments: argparse.Namespace) -> None:
    """Pairwise reasoning win rate of run A over run B, judged in both orders by a model behind an endpoint."""
    from cmdp.judge import Endpoint, read_completions
    from cmdp.judge import judge as compare

    try:
        options = json.loads(arguments.options)
    except ValueError as error:
        raise ValueError(f"--options takes a JSON object, not {arguments.options!r}: {error}.") from error
    endpoint = Endpoint(arguments.endpoint, arguments.model, options, arguments.timeout)
    tables = [read_completions(path) for path in (arguments.a, arguments.b)]
    template = arguments.prompt.read_text(encoding="utf-8")
    print(json.dumps(compare(*tables, endpoint, template, arguments.out, arguments.concurrency), indent=2))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another
    parser = argparse.ArgumentParser(prog="cmdp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for function in (train, memory, prune, export, judge):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        if function in (train, memory):
            command.add_argument("--config", type=Path, required=True, help="a parameter file: profiles/laptop.yaml")
            command.add_argument("overrides", nargs="*", help="section.field=value, in place of what the file says")
        if function is train:
            command.add_argument("--run", action="append", help="a run of the file (all); may be given again")
            command.add_argument("--seed", action="append", type=int, help="a seed (all of the file's)")
        if function is prune:
            command.add_argument("model", help="a Hub id, a local folder or a GGUF file")
            command.add_argument("target", type=Path, help="a new folder")
            command.add_argument("--without", type=int, nargs="+", required=True, help="layers, counted from 0")
        if function is export:
            command.add_argument("folder", type=Path, help="a trained student: models/default/cmdp-adaptive/0")
            command.add_argument("target", type=Path, help="a new folder")
            command.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its base model")
        if function is judge:
            command.add_argument("a", type=Path, help="completions of run A: a CSV with prompt, completion[, sample]")
            command.add_argument("b", type=Path, help="of run B")
            command.add_argument("--endpoint", required=True, help="http://localhost:8000/v1; its key: JUDGE_API_KEY")
            command.add_argument("--model", required=True, help="the judge's name at the endpoint")
            command.add_argument("--out", type=Path, required=True, help="folder of replies, verdicts and summary")
            command.add_argument("--prompt", type=Path, default=Path(__file__).with_name("judge_prompt.txt"))
            command.add_argument("--options", default='{"temperature": 0, "max_tokens": 512}', help="of each request")
            command.add_argument("--timeout", type=float, default=120.0, help="seconds per request")
            command.add_argument("--concurrency", type=int, default=4, help="requests at a time")
    arguments = parser.parse_args()
    try:
        arguments.function(arguments)
    except KeyboardInterrupt as stopped:
        print(f"cmdp {arguments.function.__name__}: {stopped or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        if os.environ.get("CMDP_TRACEBACK"):
            raise
        sys.exit(f"cmdp {arguments.function.__name__}: {error} (CMDP_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
