"""The pipeline's command, `python -m replication STAGE`: dvc.yaml runs its stages."""

import argparse
import os
import sys
import warnings
from pathlib import Path


def pretrain(arguments: argparse.Namespace) -> None:
    """Train a start model on solutions: results/start/NAME."""
    from replication.run import pretrain as stage

    stage(arguments.name)


def run(arguments: argparse.Namespace) -> None:
    """Train and measure one run, all of its seeds: results/runs/PART/NAME."""
    from replication.run import run as stage

    stage(arguments.name)


def trial(arguments: argparse.Namespace) -> None:
    """Train and measure the tuning trials of one entry: results/tuning/NAME.csv."""
    from replication.run import trial as stage

    stage(arguments.name)


def choose(_: argparse.Namespace) -> None:
    """Choose each run's settings from the trials: results/chosen.yaml."""
    from replication.tune import write_choice

    write_choice()


def tables(arguments: argparse.Namespace) -> None:
    """Compute the tables of a part, default or study, and the study's verdicts."""
    from replication import claims
    from replication import tables as room
    from replication.experiments import RESULTS

    if arguments.name == "default":
        room.write_default(RESULTS)
    else:
        room.write_study(RESULTS)
        claims.write(RESULTS)
    print(f"Tables of {arguments.name}: {RESULTS}")


def figures(arguments: argparse.Namespace) -> None:
    """Draw the figures of default, study or theory from results files."""
    from replication import plots
    from replication.experiments import FIGURES, RESULTS
    from replication.theory import plots as theory_plots

    if arguments.name == "theory":
        theory_plots.draw_all(RESULTS / "theory", FIGURES / "theory")
    else:
        {"default": plots.draw_default, "study": plots.draw_study}[arguments.name](RESULTS, FIGURES / arguments.name)


def theory(_: argparse.Namespace) -> None:
    """Check the guarantees on token trees and judge the learners by the exact optimum: results/theory."""
    import torch

    from cmdp.storage import read_yaml, whole
    from replication import theory
    from replication.experiments import RESULTS

    torch.set_num_threads(1)
    with whole(RESULTS / "theory") as folder:
        theory.run(read_yaml(Path(theory.__file__).with_name("params.yaml")), folder)


def readme(_: argparse.Namespace) -> None:
    """Fill the generated tables of README.md and docs/."""
    from replication.readme import fill_all

    fill_all()


def benchmark(arguments: argparse.Namespace) -> None:
    """Time a training step next to TRL's own trainers: results/benchmark/NAME.csv."""
    from replication.benchmark import benchmark as stage

    print(stage(arguments.name).to_string())


def gsm8k(arguments: argparse.Namespace) -> None:
    """Check answers and steps of GSM8K's own solutions, read from the folder NAME: results/gsm8k/check.json."""
    from cmdp.storage import write_json
    from replication.experiments import RESULTS
    from replication.gsm8k import check_gsm8k

    write_json(check_gsm8k(arguments.name), RESULTS / "gsm8k" / "check.json")


def keys(arguments: argparse.Namespace) -> None:
    """Print the runs of a part, as a pattern for parallel.sh."""
    from replication.experiments import rows

    print("|".join(rows(part=arguments.name)))


def smoke(arguments: argparse.Namespace) -> None:
    """Shrink the parameter files under the folder NAME to what profiles/smoke.yaml says."""
    import yaml
    from omegaconf import OmegaConf

    overlay = OmegaConf.load("profiles/smoke.yaml")
    for name, change in overlay.files.items():
        path = Path(arguments.name, name)
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), change))
        if "runs" in merged:
            merged["runs"] = {key: merged["runs"][key] | {"seeds": [0]} for key in overlay.keep}
        path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before NumPy loads
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another
    parser = argparse.ArgumentParser(prog="python -m replication", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="stage")
    for stage in (pretrain, run, trial, choose, tables, figures, theory, readme, benchmark, gsm8k, keys, smoke):
        command = commands.add_parser(stage.__name__, help=stage.__doc__)
        command.set_defaults(stage=stage)
        if stage not in (choose, theory, readme):
            parts = {
                keys: ("default", "study"),
                tables: ("default", "study"),
                figures: ("default", "study", "theory"),
            }.get(stage)
            command.add_argument("name", choices=parts)
    arguments = parser.parse_args()
    try:
        arguments.stage(arguments)
    except (FileNotFoundError, ValueError) as error:
        if os.environ.get("CMDP_TRACEBACK"):
            raise
        sys.exit(f"replication {arguments.stage.__name__}: {error} (CMDP_TRACEBACK=1 shows where)")
