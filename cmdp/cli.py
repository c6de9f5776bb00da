"""The `cmdp` command: one subcommand a pipeline stage. `cmdp --help` lists them, dvc.yaml runs them.

Every number comes from params.yaml and, as tuning chose it, from tuning/chosen.yaml; of a profile, from its own file. A
stage writes its outputs beside their place and moves them there when they are whole, so that nothing half-written
passes for finished; training stages keep checkpoints under checkpoints/ and, run again after an interruption, go on
from the last.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import pandas as pd
import yaml

from cmdp.storage import checkpoint_folder, provenance, read_yaml, whole, write_json, write_table, write_text

CHOSEN, STUDY = Path("tuning/chosen.yaml"), Path("study/params.yaml")
DATA, MODELS, RESULTS, FIGURES = (Path(name) for name in ("data", "models", "results", "figures"))


def data(params: dict, _: argparse.Namespace) -> None:
    """Draw the problems: disjoint splits for supervised learning, training, validation and test."""
    from cmdp.tasks import load_task

    settings = params["task"]
    splits = load_task(settings["name"]).problems(settings["sizes"], tuple(settings["steps"]), settings["seed"])
    with whole(DATA) as folder:
        for name, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def supervised(params: dict, arguments: argparse.Namespace) -> None:
    """Train the teacher or the student on solutions."""
    from cmdp.models import build_model, build_tokenizer
    from cmdp.runs import steps_to
    from cmdp.supervised import train_supervised
    from cmdp.tasks import load_task, read_problems

    role = arguments.role
    shape = {key: params[role][key] for key in ("layers", "hidden", "heads")}
    settings = params["supervised"] | {key: params[role][key] for key in ("max_steps", "learning_rate")}
    tokenizer = build_tokenizer(load_task(params["task"]["name"]).vocabulary())
    model = build_model(tokenizer, **shape, seed=settings["seed"])
    problems = read_problems(DATA / "supervised.jsonl")
    checkpoints, resume = checkpoint_folder(role, shape | settings, [DATA / "supervised.jsonl"])
    with steps_to(checkpoints / "steps.txt"):
        log = train_supervised(model, tokenizer, problems, checkpoints, resume, settings)
    with whole(MODELS / role) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{role}: {model.num_parameters()} parameters, last losses {[r['loss'] for r in log if 'loss' in r][-3:]}")
    shutil.rmtree(checkpoints)


def train(params: dict, arguments: argparse.Namespace) -> None:
    """Distil the student by one run's method and seed."""
    from cmdp.runs import distil, write_log

    run, name = arguments.run, f"{arguments.run}/{arguments.seed}"
    settings = {**params["train"], **params["budget"], **params["runs"].get(run, {}), "seed": arguments.seed}
    trained = distil(run, settings, params["task"]["name"], DATA, MODELS, "student", name)
    write_log(trained.log, RESULTS, MODELS / "timing", name)
    with whole(MODELS / "runs" / name) as folder:
        trained.student.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
    shutil.rmtree(trained.checkpoints)


def evaluate(params: dict, arguments: argparse.Namespace) -> None:
    """Measure one run, all of its seeds, on the held-out prompts and on problems longer than any in training."""
    from cmdp.collect import write_measures
    from cmdp.models import load_pair

    for seed in params["seeds"]:
        pair = load_pair(MODELS / "runs" / arguments.run / str(seed), MODELS / "teacher")
        write_measures(measure(params, pair, seed), RESULTS, arguments.run, seed)


def measure(params: dict, pair: tuple, seed: int) -> dict[str, pd.DataFrame]:
    """The tables of one student, its teacher and their tokenizer: completions of held-out prompts (`runs`), of longer
    problems (`longer`), the cumulative cost by position (`positions`), and the texts whose answer is right and whose
    steps are not (`examples`)."""
    from cmdp.evaluation import evaluate as measure
    from cmdp.runs import longer_problems
    from cmdp.tasks import load_task, read_problems

    settings, task = params["evaluate"], load_task(params["task"]["name"])
    held_out = read_problems(DATA / f"{settings['split']}.jsonl")[: settings["prompts"]]
    longer, limit = settings["longer"], params["train"]["max_completion_length"]
    completions, positions = measure(
        *pair, task, held_out, settings["samples"], limit, settings["batch_size"], seed, settings["greedy"]
    )
    right_by_chance = completions.query("decoding == 'sampled' and correct == 1 and valid == 0")
    problems = [held_out[index]["prompt"].strip() for index in right_by_chance["prompt"]]
    examples = right_by_chance[["prompt", "completion"]].assign(problem=problems)
    more, _ = measure(
        *pair,
        task,
        longer_problems(task, longer, params["task"]["seed"]),
        longer["samples"],
        longer["max_completion_length"],
        settings["batch_size"],
        seed,
        greedy=False,
    )
    completions, more = (table.drop(columns="completion") for table in (completions, more))
    return {"runs": completions, "positions": positions, "longer": more, "examples": examples}


def collect(params: dict, _: argparse.Namespace) -> None:
    """Gather all runs: summary, metrics, training curves, times, provenance."""
    from cmdp.collect import collect as gather_all

    gather_all(params, RESULTS, MODELS / "timing")


def figures(params: dict, arguments: argparse.Namespace) -> None:
    """Draw every figure of the default experiment, of the theory or of the study, from its results files."""
    if arguments.subject == "theory":
        from replication.theory.plots import draw_all

        draw_all(RESULTS / "theory", FIGURES / "theory")
    elif arguments.subject == "study":
        from replication.study_plots import draw_all

        draw_all(RESULTS / "study", FIGURES / "study")
    else:
        from replication.plots import draw_all

        draw_all(RESULTS, FIGURES / "default", params)


def theory(params: dict, _: argparse.Namespace) -> None:
    """Check the guarantees on token trees and set the learners against the exact optimum."""
    import torch

    from replication.theory.study import run

    torch.set_num_threads(params["threads"])
    with whole(RESULTS / "theory") as folder:
        run(params["theory"], folder)


def trial(params: dict, arguments: argparse.Namespace) -> None:
    """Train one trial of the tuning grid, once a seed, and measure it on validation prompts."""
    from cmdp.evaluation import evaluate as measure
    from cmdp.runs import distil
    from cmdp.statistics import with_budget
    from cmdp.tasks import load_task, read_problems
    from replication.tune import MEASURES

    tuning = read_params(Path("tuning/params.yaml"))
    run, name, task = arguments.run, f"{arguments.run}-{arguments.index}", params["task"]["name"]
    tried = tuning["grid"][run][arguments.index]
    rows, checkpoints = [], []
    for seed in tuning["seeds"]:
        settings = {**params["train"], **params["budget"], **tried, "seed": seed}
        trained = distil(run, settings, task, DATA, MODELS, "student", f"tuning/{name}-{seed}")
        completions, _ = measure(
            trained.student,
            trained.teacher,
            trained.tokenizer,
            load_task(task),
            read_problems(DATA / "validation.jsonl"),
            tuning["samples"],
            params["train"]["max_completion_length"],
            params["evaluate"]["batch_size"],
            seed,
            greedy=False,
        )
        sampled = with_budget(completions, **params["budget"])
        measures = sampled[["correct", "satisfied", "correct_within", "cost"]].mean()
        measures.index = MEASURES
        rows.append({"run": run, "index": arguments.index, "seed": seed, **tried, **measures})
        checkpoints.append(trained.checkpoints)
    write_table(pd.DataFrame(rows), RESULTS / "tuning" / f"{name}.csv")
    for folder in checkpoints:
        shutil.rmtree(folder)


def arm(params: dict, arguments: argparse.Namespace) -> None:
    """Train and measure one arm of the study, all of its seeds: results/study/arms/NAME.csv."""
    from replication.run import arm as train_and_measure

    settings = read_params(STUDY)["arms"][arguments.name]
    params["evaluate"]["greedy"] = False
    paths = {"data": DATA, "models": MODELS}
    done = [train_and_measure(params, settings, measure, paths, arguments.name, seed) for seed in settings["seeds"]]
    tables, times, checkpoints = zip(*done, strict=True)
    write_table(pd.concat(times, ignore_index=True), MODELS / "arms" / f"{arguments.name}.csv")
    write_table(pd.concat(tables, ignore_index=True), RESULTS / "study" / "arms" / f"{arguments.name}.csv")
    for folder in checkpoints:
        shutil.rmtree(folder)


def study(params: dict, _: argparse.Namespace) -> None:
    """Compute every table of the study, and the verdicts."""
    from replication import claims, tables
    from replication import run as arms

    settings = read_params(STUDY)
    measured = [path for name in settings["arms"] if (path := MODELS / "arms" / f"{name}.csv").is_file()]
    if not measured:
        raise FileNotFoundError(f"There are no arms under {MODELS / 'arms'}: run `make study` first.")
    times = pd.concat([pd.read_csv(path) for path in measured])
    completions = arms.read(RESULTS, params, settings["arms"])
    trials = pd.read_csv(RESULTS / "tuning.csv")
    tables.write_all(completions, times, trials, params, settings, RESULTS / "study")
    write_table(claims.judge(completions, RESULTS, params, settings["claims"]), RESULTS / "study" / "claims.csv")


def choose(params: dict, _: argparse.Namespace) -> None:
    """Choose each run's settings from the trials, and write them to tuning/chosen.yaml for the experiment to use."""
    from replication import tune as tuning

    trials = tuning.read_trials(RESULTS / "tuning")
    best = tuning.choose(trials)
    write_table(trials.assign(chosen=trials.index.isin(best.index).astype(int)), RESULTS / "tuning.csv")
    chosen = {"sft": {}} | {row["run"]: tuning.settings_of(row) for _, row in best.iterrows()}
    # TRL's own trainers take what was tuned for ours
    chosen |= {f"trl-{run}": dict(chosen[run]) for run in ("grpo", "gkd")}
    # the budget plays a part in the choice, none in what GRPO maximises: so once more without it
    unconstrained = tuning.choose(trials[trials["run"] == "grpo"], "accuracy").iloc[0]
    chosen["grpo-by-accuracy"] = tuning.settings_of(unconstrained)
    header = "# Written by `cmdp choose` from results/tuning.csv: what each run adds to `train` in params.yaml.\n\n"
    leading = {"soft": tuning.best(trials, "gkd-grpo"), "ours": tuning.best(trials, "cmdp-")}
    write_text(header + yaml.safe_dump({"best": leading, "runs": chosen}, sort_keys=False), CHOSEN)


def report(params: dict, _: argparse.Namespace) -> None:
    """Write the generated tables of README.md, the verdicts among them."""
    from replication.readme import readme

    path = Path("README.md")
    write_text(readme(path.read_text(encoding="utf-8"), RESULTS, params), path)


def benchmark(params: dict, _: argparse.Namespace) -> None:
    """Time a training step next to TRL's own trainers."""
    from replication.benchmark import benchmark as measure

    for name, sizes in params["benchmark"].items():
        print(measure(sizes, RESULTS / "benchmark" / f"{name}.csv").to_string())


def gsm8k(_: dict, arguments: argparse.Namespace) -> None:
    """Check the answers and steps of GSM8K's own solutions: results/gsm8k/check.json."""
    from cmdp.tasks.gsm import check_gsm8k

    write_json(check_gsm8k(arguments.folder), RESULTS / "gsm8k" / "check.json")


def export(params: dict, arguments: argparse.Namespace) -> None:
    """Export a trained student for use without teacher and without this package, with a model card."""
    from cmdp.export import export as write
    from cmdp.methods import METHODS, method_of

    name, run, seed = arguments.folder.resolve().parts[-3:]
    results, base_model = RESULTS, str(MODELS / "student")
    if told := [path for path in (RESULTS / name / "profile.yaml", Path(f"profiles/{name}.yaml")) if path.is_file()]:
        params = read_yaml(told[0])
        results, base_model = RESULTS / name, params["student"]["model"]
    method = method_of(run)
    settings = {**params["train"], **params["budget"], **METHODS.get(method, {}), **(params["runs"].get(run) or {})}
    settings |= {"run": run, "method": method, "seed": seed, "base_model": base_model}
    measured = (results / "summary.csv").is_file()
    summary = pd.read_csv(results / "summary.csv") if measured else None
    record = json.loads((results / "provenance.json").read_text(encoding="utf-8")) if measured else provenance()
    write(arguments.folder, arguments.target, settings, summary, record["commit"], arguments.merge)


def prune(_: dict, arguments: argparse.Namespace) -> None:
    """Make a student of a model's own weights, by leaving out layers."""
    from cmdp.prune import prune as leave_out

    before, after = leave_out(arguments.model, arguments.without, arguments.target)
    print(f"{arguments.target}: {after:,} parameters of {before:,}")


def judge(_: dict, arguments: argparse.Namespace) -> None:
    """Pairwise reasoning win rate of run A over run B, judged in both orders by a model behind an endpoint."""
    from cmdp.judge import Endpoint, read_completions
    from cmdp.judge import judge as compare

    endpoint = Endpoint(arguments.endpoint, arguments.model, json.loads(arguments.options), arguments.timeout)
    tables = [read_completions(path) for path in (arguments.a, arguments.b)]
    template = arguments.prompt.read_text(encoding="utf-8")
    print(json.dumps(compare(*tables, endpoint, template, arguments.out, arguments.concurrency), indent=2))


def notebook(params: dict, arguments: argparse.Namespace) -> None:
    """Execute a notebook into results/notebooks, with papermill."""
    import papermill

    source = Path("notebooks") / f"{arguments.name}.ipynb"
    target = RESULTS / "notebooks" / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".partial.ipynb")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, of widgets that no notebook shows
    papermill.execute_notebook(
        str(source), str(unfinished), parameters=params["notebooks"].get(arguments.name, {}), progress_bar=False
    )
    unfinished.replace(target)


def read_params(path: Path, overlay: Path | None = None) -> dict:
    """The parameters of `path`; where `overlay` is given, what it sets takes their place, key by key."""

    def merge(base: dict, top: dict) -> dict:
        both = base.keys() & top.keys()
        nested = {key: merge(base[key], top[key]) for key in both if isinstance(top[key], dict) and base[key]}
        return base | top | nested

    if not path.is_file():
        raise FileNotFoundError(f"There is no {path} here: run `cmdp` at the root of the repository.")
    params = read_yaml(path)
    if CHOSEN.is_file():
        params |= read_yaml(CHOSEN)
    return merge(params, read_yaml(overlay)) if overlay else params


def overlay(params: dict, arguments: argparse.Namespace) -> None:
    """Print the parameters with a profile's laid over them."""
    yaml.safe_dump(params, sys.stdout, sort_keys=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="cmdp", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (params.yaml)")
    parser.add_argument("--overlay", type=Path, help="a profile, laid over the parameters")
    commands = parser.add_subparsers(required=True, metavar="command")
    of_the_pipeline = (data, supervised, train, evaluate, collect, theory, figures, arm, notebook)
    of_models = (memory, prune, export, judge, gsm8k)
    for stage in (*of_the_pipeline, trial, choose, study, report, benchmark, *of_models, overlay):
        command = commands.add_parser(stage.__name__, help=stage.__doc__)
        command.set_defaults(stage=stage)
        if stage is supervised:
            command.add_argument("role", help="a section of the parameters: teacher, student, student-half, ...")
        if stage is figures:
            command.add_argument("subject", nargs="?", choices=("default", "theory", "study"), default="default")
        if stage in (notebook, arm):
            command.add_argument("name")
        if stage is gsm8k:
            command.add_argument("folder", type=Path, help="of GSM8K's train.jsonl and test.jsonl")
        if stage is export:
            command.add_argument("folder", type=Path, help="a trained student: models/runs/cmdp-adaptive/0")
            command.add_argument("target", type=Path, help="a new folder")
            command.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its base model")
        if stage is prune:
            command.add_argument("model", help="a Hub id, a local folder or a GGUF file")
            command.add_argument("target", type=Path, help="a new folder")
            command.add_argument("--without", type=int, nargs="+", required=True, help="layers, counted from 0")
        if stage is judge:
            command.add_argument("a", type=Path, help="completions of run A: a CSV with prompt, completion[, sample]")
            command.add_argument("b", type=Path, help="of run B")
            command.add_argument("--endpoint", required=True, help="http://localhost:8000/v1; its key: JUDGE_API_KEY")
            command.add_argument("--model", required=True, help="the judge's name at the endpoint")
            command.add_argument("--out", type=Path, required=True, help="folder of replies, verdicts and summary")
            command.add_argument("--prompt", type=Path, default=Path(__file__).with_name("judge_prompt.txt"))
            command.add_argument("--options", default='{"temperature": 0, "max_tokens": 512}', help="of each request")
            command.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take")
            command.add_argument("--concurrency", type=int, default=4, help="requests at a time")
        if stage is trial:
            command.add_argument("run", help="a method, with its variant: gkd-grpo-weak")
            command.add_argument("index", type=int, help="of the run's trials in tuning/params.yaml, from 0")
        if stage in (data, train, evaluate, collect, memory):
            command.add_argument("--config", type=Path, help="a profile of real models, instead of the parameters")
            words = "section.field=value: with --config, what the profile is to say instead"
            if stage in (train, evaluate):
                words = "RUN (a method, with its variant: gkd-grpo-weak), and SEED to train or with --config; " + words
            command.add_argument("words", nargs="*", help=words)
    arguments = parser.parse_args()
    try:
        if getattr(arguments, "config", None):
            run_profile(arguments)
            return
        if hasattr(arguments, "words"):
            read_words(arguments)
        params = read_params(arguments.params, arguments.overlay)
        set_up(params, offline=arguments.stage not in of_models)
        arguments.stage(params, arguments)
    except (FileNotFoundError, ConnectionError, ValueError, KeyError) as error:
        if os.environ.get("CMDP_TRACEBACK"):
            raise
        message = f"the parameters have no {error}" if isinstance(error, KeyError) else error
        sys.exit(f"cmdp {arguments.stage.__name__}: {message} (CMDP_TRACEBACK=1 shows where)")


def memory(params: dict, _: argparse.Namespace) -> None:
    """Sum up what training a profile's models takes in memory, from their configurations alone."""
    raise ValueError("this is for real models: name a profile, --config profiles/laptop.yaml.")


def run_profile(arguments: argparse.Namespace) -> None:
    """Run the stage for a profile of real models, which may be downloaded unless HF_HUB_OFFLINE forbids it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another
    from cmdp import profile

    profile.run(arguments.stage.__name__, arguments.config, arguments.words)


def read_words(arguments: argparse.Namespace) -> None:
    """RUN, and for training SEED, of a stage of the default experiment."""
    if arguments.stage is train:
        if len(arguments.words) != 2 or not arguments.words[1].isdecimal():
            raise ValueError("name a RUN and a SEED, such as `cmdp 0`, or with --config a profile.")
        arguments.run, arguments.seed = arguments.words[0], int(arguments.words[1])
    elif arguments.stage is evaluate:
        if len(arguments.words) != 1:
            raise ValueError("name a RUN, such as `cmdp`, all of whose seeds are measured, or with --config a profile.")
        arguments.run = arguments.words[0]
    elif arguments.words:
        raise ValueError(f"{arguments.words[0]!r} goes with --config only.")


def set_up(params: dict, offline: bool) -> None:
    """Make a run repeatable and quiet: a fixed number of threads and, if `offline`, no network."""
    threads = str(params["threads"])
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false")
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another


if __name__ == "__main__":
    main()
