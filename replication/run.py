"""Arms: methods with settings of their own beside the default experiment, and all of their completions in one table.

An arm is a method with settings of its own, from a student of its own, over some seeds (study/params.yaml). It keeps no
model: each seed is trained, measured and let go.
"""

from pathlib import Path

import pandas as pd

from cmdp.collect import gather

COLUMNS = ["seed", "split", "prompt", "correct", "valid", "tokens", "entropy", "cost", "peak", "confidence", "style"]


def arm(params: dict, settings: dict, measure, paths: dict[str, Path], name: str, seed: int) -> tuple:
    """Train and measure one seed of an arm.

    Args:
        params: of the default experiment, with the settings that tuning chose.
        settings: the arm's, from study/params.yaml.
        measure: `(params, (student, teacher, tokenizer), seed) -> {"runs": table, "longer": table}`.
        paths: of `data` and `models`.

    Returns:
        its completions, a row each, those of longer problems told apart by `split`; its times, a row; and the folder of
        its checkpoints, to be deleted when both are written.

    Raises:
        ValueError: tuning has chosen no settings of the arm's run.
    """
    from cmdp.runs import distil

    run = settings["run"]
    if run not in params["runs"]:
        raise ValueError(f"tuning/chosen.yaml has no settings of {run}: give it trials, and run `make tune`.")
    fields = {**params["train"], **params["budget"], **params["runs"][run], **settings.get("set", {}), "seed": seed}
    start = settings["start"]
    trained = distil(run, fields, params["task"]["name"], paths["data"], paths["models"], start, f"study/{name}-{seed}")
    tables = measure(params, (trained.student, trained.teacher, trained.tokenizer), seed)
    table = pd.concat([tables["runs"].assign(split="test"), tables["longer"].assign(split="longer")])
    table = table[table["decoding"] == "sampled"].assign(seed=seed)[COLUMNS].round(4)
    whole = [entry["train_runtime"] for entry in trained.log if "train_runtime" in entry]
    phases = pd.DataFrame([entry for entry in trained.log if "csr" in entry]).filter(like="time/").median()
    times = {"arm": name, "seed": seed, "steps": fields["max_steps"], "seconds": sum(whole), **phases}
    times["parameters"] = trained.student.num_parameters()
    return table, pd.DataFrame([times]), trained.checkpoints


def read(results: Path, params: dict, arms: dict) -> pd.DataFrame:
    """Every sampled completion of the default experiment and of the study: `COLUMNS`, and `arm`.

    The default experiment's runs are arms of their own names; an arm of the same name adds seeds to them.

    Raises:
        FileNotFoundError: the default experiment has not been run.
        ValueError: an arm has a seed that the default experiment has, too.
    """
    tables = []
    for folder, split in (("runs", "test"), ("longer", "longer")):
        table = gather(results / folder, params)
        tables.append(table[table["decoding"] == "sampled"].assign(arm=table["run"], split=split))
    for name, settings in arms.items():
        if name in params["methods"] and (twice := sorted({*settings["seeds"]} & {*params["seeds"]})):
            raise ValueError(f"The default experiment has seeds {twice} of {name}: give the study's arm others.")
        path = results / "study" / "arms" / f"{name}.csv"
        if path.is_file():
            tables.append(pd.read_csv(path).assign(arm=name))
    return pd.concat(tables, ignore_index=True)[["arm", *COLUMNS]].fillna({"style": ""})
