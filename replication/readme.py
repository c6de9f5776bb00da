"""Generated tables of README.md and docs/: written between markers, from results files alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from cmdp.methods import START
from cmdp.storage import read, read_yaml, write_text
from replication.experiments import EXPERIMENTS, RESULTS, gather, rows
from replication.tables import equal_csr, of_profile, percent, spelled
from replication.theory import OURS
from replication.theory import tables as theory

COLUMNS = {"accuracy": "accuracy (%)", "csr": "CSR (%)", "accuracy_within": "accuracy within budget (%)"}
COLUMNS |= {"greedy_accuracy": "greedy accuracy (%)", "cost": "mean cost (nats)"}
SPECS = {"cost": "z.2f", "kl_per_token": "z.3f"}  # of numbers; else z.1f
CONTESTS = {"measured": "this one, as trained", "design": "this one, as designed", "careful": "a careful teacher"}


def fill_all(results: Path = RESULTS) -> None:
    """Write every generated table into its file (`FILES`)."""
    for path in map(Path, FILES):
        write_text(filled(path, results), path)


def filled(path: Path, results: Path = RESULTS) -> str:
    """The text of `path` with its generated tables; one whose results are missing stays as it is. Raises `ValueError`
    if the file lacks a marker."""
    text = path.read_text(encoding="utf-8")
    for name, table in FILES[str(path)].items():
        begin, end = f"<!-- {name}: generated -->\n", f"\n<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise ValueError(f"{path} lacks the markers of {name!r}: add {begin.strip()} and {end.strip()}.")
        try:
            text = f"{before}{begin}{table(results)}{end}{rest.partition(end)[2]}"
        except FileNotFoundError as error:
            print(f"{path}: the table {name} stays as it is. {error}")
    return text


def markdown(table: pd.DataFrame, titles: dict[str, str]) -> str:
    """The columns `titles` of a table in Markdown: texts as they are, shares in per cent."""
    shown = table[[*titles]].map(lambda value: value if isinstance(value, str) else f"{100 * value:z.1f}")
    head, *rows = (f"| {' | '.join(line)} |" for line in (titles.values(), *shown.to_numpy()))
    return "\n".join([head, f"|{'---|' * len(titles)}", *rows])


def wide(table: pd.DataFrame, index: str, columns: str, value: str = "mean") -> pd.DataFrame:
    """A long table of shares laid out for reading, in its own order: per cent, with intervals in brackets."""
    laid_out = table.assign(shown=percent(table, value)).pivot(index=index, columns=columns, values="shown")
    return laid_out.loc[table[index].unique(), table[columns].unique()].fillna("")


def measures_table(summary: pd.DataFrame, columns: dict[str, str], before: tuple[str, ...] = ()) -> str:
    """A row per run: its `before` columns, and each measure of `columns` with its interval, or - where it has none."""
    shown = summary[summary["measure"].isin(columns)]
    values = shown[["measure", "mean", "low", "high"]].to_numpy()
    texts = [spelled(v, spec=SPECS.get(name, "z.1f"), scale=100 if "%" in columns[name] else 1) for name, *v in values]
    wide = shown.assign(text=texts).pivot(index="run", columns="measure", values="text").reindex(columns=columns)
    table = shown.groupby("run", sort=False)[list(before)].first().astype(str).join(wide.fillna("-"))
    return markdown(table.reset_index(), {name: name for name in ("run", *before)} | columns)


def default_table(results: Path) -> str:
    """The default experiment's summary: a row per run, mean with its 95 % interval, and the sizes of its models."""
    summary = pd.read_csv(results / "summary.csv")
    sizes = gather("times", rows(), results / "runs").drop_duplicates("run").set_index("run")["parameters"]
    columns = {name: title for name, title in COLUMNS.items() if name != "accuracy_within"}
    return (
        f"{measures_table(summary, columns)}\n\nHeld-out prompts, sampled at temperature 1 unless greedy; "
        f"{summary['seeds'].max()} seeds; in brackets 95 % bootstrap intervals. "
        f"The student has {sizes['sft']:,} parameters, the teacher {sizes['teacher']:,}."
    )


def gain_table(results: Path) -> str:
    """Our constrained method at each budget: what it gained over the soft Lagrangian, and what there was to gain."""
    ours, table = read_yaml(results / "chosen.yaml")["best"]["ours"], pd.read_csv(results / "study" / "equal_csr.csv")
    exact = pd.read_csv(results / "contest.csv").query("experiment == 'measured'").set_index("budget")["gap"]
    table = table[table["method"] == ours].sort_values("budget")
    within, exact = table["budget"].map("{:g} nats".format), table["budget"].map(exact)
    titles = {"within": f"`{ours}` within", "csr": "CSR (%)", "accuracy": "accuracy (%)"}
    titles |= {"gain": "points more than the soft Lagrangian at that CSR", "exact": "points to be won, exact"}
    return markdown(table.assign(within=within, gain=percent(table, "difference", spec="+.1f"), exact=exact), titles)


def verdicts_table(results: Path) -> str:
    """The claims by their verdicts: a row per verdict."""
    claims = pd.read_csv(results / "claims.csv")
    texts = (claims["id"] + ": " + claims["claim"].str.removeprefix("ours: ")).groupby(claims["verdict"], sort=False)
    table = texts.agg("; ".join).rename("claims").reset_index()
    return markdown(table.assign(verdict="**" + table["verdict"] + "**"), {"verdict": "here", "claims": "claims"})


def claims_table(results: Path) -> str:
    """The claims with their verdicts, evidence and conditions."""
    claims = pd.read_csv(results / "claims.csv")
    titles = {"id": "", "claim": "claim", "published": "published", "verdict": "verdict here"}
    titles |= {name: name for name in ("evidence", "conditions")}
    return markdown(claims.assign(verdict="**" + claims["verdict"] + "**"), titles)


def study_table(results: Path) -> str:
    """Every method of the study: a row per run, mean with its 95 % interval."""
    summary = pd.read_csv(results / "study" / "summary.csv")
    return measures_table(summary[summary["family"] == "method"], COLUMNS, ("seeds",))


def contest_table(results: Path) -> str:
    """What a constraint on trajectories can add, exactly: a row per experiment and budget."""
    titles = {"experiment": "experiment", "budget": "budget (nats)", "teacher": "teacher (%)", "ceiling": "ceiling (%)"}
    titles |= {"budgeted": "budgeted optimum (%)", "soft": "best soft Lagrangian (%)", "gap": "gap (points)"}
    table = pd.read_csv(results / "contest.csv", dtype={"budget": str})
    return markdown(table.replace({"experiment": CONTESTS}), titles)


def equal_table(results: Path) -> str:
    """Each constrained method at each budget against the soft Lagrangian's curve, and against its best lambda."""
    table = pd.read_csv(results / "study" / "equal_csr.csv").sort_values("budget", kind="stable")
    best = percent(table, "target_difference", "target_", "+.1f") + table["soft_lambda"].map(" (λ = {:g})".format)
    best = best.mask(table["soft_lambda"].isna(), "-")
    titles = {"method": "method", "budget": "budget (nats)", "accuracy": "accuracy (%)", "csr": "CSR (%)"}
    titles |= {"curve": "points more than soft at its CSR", "best": "than the best λ that keeps 95 %"}
    shown = table.assign(budget=table["budget"].map("{:g}".format), curve=against_curve(table), best=best)
    return markdown(shown, titles)


def against_curve(table: pd.DataFrame) -> pd.Series:
    """The differences of `tables.equal_csr`, or what takes their place."""
    stricter = table["place"].map({"stricter": ", stricter than every λ"}).fillna("")
    shown = percent(table, "difference", spec="+.1f") + stricter
    return shown.mask(table["place"] == "looser", "looser than every λ")


def rebuilt_table(results: Path) -> str:
    """The default experiment once more, start models and all: a row per run, how long it took, and on what."""
    summary, made = pd.read_csv(results / "rebuilt" / "summary.csv"), read(results / "rebuilt" / "provenance.json")
    columns = {name: COLUMNS[name] for name in ("accuracy", "csr", "greedy_accuracy", "cost")}
    return (
        f"{measures_table(summary, columns)}\n\n{summary['seeds'].max()} seeds; `{made['command']}` took "
        f"{made['seconds'] / 60:.0f} minutes on {made['cores']} cores ({made['processor']}) that other work shared, at "
        f"commit {made['commit'][:7]}."
    )


def benchmark_table(results: Path) -> str:
    """The time of a training step next to that of TRL's trainers: a row per ratio, a column per size."""
    tables, made = {}, pd.DataFrame()
    for size in ("default", "large-vocabulary"):
        made = pd.read_csv(results / "benchmark" / f"{size}.csv").query("phase == 'step' and unit == 'ratio'")
        tables[size] = made.set_index("trainer")[["median", "low", "high"]].apply(spelled, axis=1, spec=".2f", scale=1)
    titles = {"trainer": "time of a step"} | {size: size.replace("-", " ") for size in tables}
    shown = markdown(pd.DataFrame(tables).reset_index(), titles)
    return f"{shown}\n\nMedian and its 95 % interval; {made['device'].iloc[0]}."


def theory_table(results: Path) -> str:
    """Learners on token trees against the exact optimum: a row per method, with 95 % intervals."""
    names = {"soft optimum, never": "*soft Lagrangian, best λ per tree, exact*"} | {
        name: f"{name} (ours)" for name in OURS
    }
    table = theory.sampled_learners(results / "theory").rename(index=names).rename_axis("learner").reset_index()
    table = table[~table["learner"].str.startswith("soft optimum")]
    shown = table.assign(**{name: percent(table, name, f"{name}_") for name in ("of_optimum", "csr")})
    found = theory.summary(results / "theory", "mean_is_not_enough")
    least, median, most = (f"{100 * found[name]:.0f}" for name in ("min", "median", "max"))
    return (
        markdown(shown, {"learner": "learner", "of_optimum": "reward, % of the optimum's", "csr": "CSR (%)"})
        + f"\n\n{table['trees'].iloc[0]} held-out trees, all budgets; in brackets 95 % bootstrap intervals over trees. "
        f"The best soft\nLagrangian that meets the budget on average leaves {least} to {most} % of a tree's "
        f"trajectories over it\n(median {median} %)."
    )


def laptop_table(results: Path, name: str = "laptop-gpu") -> str:
    """The measures of profiles/laptop.yaml in the folder `name`: a row per run, and how they were taken."""
    summary, profile = pd.read_csv(results / name / "summary.csv"), read_yaml(results / name / "profile.yaml")
    train, evaluated, device = profile["train"], profile["evaluate"], read(results / name / "provenance.json")["device"]
    batch = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    columns = {measure: COLUMNS[measure] for measure in ("accuracy", "csr", "greedy_accuracy", "cost")}
    summary = summary.sort_values("run", key=lambda runs: runs.map([*profile["runs"]].index), kind="stable")
    return (
        f"{measures_table(summary, columns)}\n\n{train['max_steps']} steps of {batch} completions; "
        f"{evaluated['prompts']} held-out prompts, {evaluated['samples']} completions each, and a greedy one; seeds: "
        f"{summary['seeds'].max()}; on {device}."
    )


def laptop_equal_table(results: Path) -> str:
    """The laptop's constrained methods against its soft Lagrangians at equal CSR: a row per method."""
    target = read_yaml(EXPERIMENTS)["claims"]["target"]
    table = equal_csr(*of_profile(results / "laptop-gpu"), target)
    titles = {"run": "run", "accuracy": "accuracy (%)", "csr": "CSR (%)", "curve": "points more than soft at its CSR"}
    return markdown(table.assign(curve=against_curve(table)), titles)


def laptop_costs_table(results: Path) -> str:
    """What a step of profiles/laptop.yaml takes: a row per machine, the median over its runs."""
    titles, rows = {"device": "on", "generation": "generation (s)", "scoring": "scoring (s)"}, []
    for folder in (results / "laptop", results / "laptop-gpu"):
        times = pd.read_csv(folder / "timing.csv").filter(like="time/").median().map("{:.2g}".format)
        device = read(folder / "provenance.json")["device"]
        rows.append({"device": device} | times.rename(lambda name: name[5:]).to_dict())
    return markdown(pd.DataFrame(rows), titles | {"update": "update (s)"})


def laptop_memory_table(results: Path) -> str:
    """What training by profiles/laptop.yaml took, next to its sum: a row per run, on a CPU and on a GPU the most of all
    seeds. What `START` took, which trains nothing, is left out."""
    taken = {}
    for folder in ("laptop", "laptop-gpu"):
        paths = sorted((results / folder / "memory").glob("*/*.json"))
        rows = [{"run": path.parent.name, **read(path)} for path in paths if path.parent.name != START]
        taken[folder] = pd.DataFrame(rows).groupby("run")[["taken_gib", "summed_gib"]].max().map("{:.1f}".format)
    table = taken["laptop"].join(taken["laptop-gpu"], rsuffix="_gpu").reset_index()
    titles = {"run": "run", "taken_gib": "CPU (GiB)", "summed_gib": "by the sum (GiB)"}
    return markdown(table, titles | {"taken_gib_gpu": "GPU (GiB)", "summed_gib_gpu": "by the sum (GiB)"})


def gpu_table(results: Path) -> str:
    """What training took on a GPU, next to its memory sum: a row per check of tests/gpu.py that trains."""
    table = pd.read_csv(results / "gpu" / "checks.csv").dropna(subset="sum_gib")
    seconds = table[["generation_s", "scoring_s", "update_s"]].sum(axis=1)
    titles = {"check": "profile", "sum_gib": "sum (GiB)", "reserved_gib": "reserved (GiB)", "step": "a step (s)"}
    numbers = {name: table[name].map("{:.1f}".format) for name in ("sum_gib", "reserved_gib")}
    return markdown(table.assign(**numbers, step=seconds.map("{:.0f}".format)), titles)


def laptop_ceiling_table(results: Path) -> str:
    """What each budget buys on the prompts of profiles/laptop.yaml: a row per budget."""
    table = pd.read_csv(results / "smollm2" / "ceiling.csv")
    sound = 100 * pd.read_csv(results / "smollm2" / "chains.csv").prod(axis=1).mean()
    teacher = pd.read_csv(results / "smollm2" / "teacher.csv").set_index("measure")[["mean", "low", "high"]]
    sampled, greedy = (spelled(teacher.loc[name]) for name in ("accuracy", "greedy_accuracy"))
    titles = {"budget": "budget (nats)", "ceiling": "ceiling (%)", "budgeted": "budgeted optimum (%)"}
    titles |= {"soft": "best soft Lagrangian at CSR 95 % (%)"}
    shown = markdown(table.assign(budget=table["budget"].map("{:g}".format)), titles)
    return (
        f"{shown}\n\nThe teacher is right in every step with probability {sound:.1f} %. Its sampled answers are right "
        f"in {sampled} %, some by luck after slips; its greedy ones in {greedy} %."
    )


def laptop_steps_table(results: Path) -> str:
    """CSR by the steps that a problem takes, a row per run of profiles/laptop.yaml, and the share of such problems."""
    completions, runs, _, budget = of_profile(results / "laptop-gpu")
    chains = pd.read_csv(results / "smollm2" / "chains.csv")
    steps = (chains < 1).sum(axis=1)  # a step that a problem has not has probability 1
    within = completions["cost"] <= budget
    table = within.groupby([completions["run"], completions["prompt"].map(steps)]).mean().unstack().loc[[*runs]]
    table.loc["*share of such problems*"] = steps.value_counts(normalize=True)
    titles = {"run": "CSR (%)"} | {count: f"{count} step{'s' * (count > 1)}" for count in table.columns}
    return markdown(table.reset_index(names="run"), titles)


def laptop_tasks_table(results: Path) -> str:
    """What SmolLM2-135M-Instruct knows before any training: a row per task."""
    titles = {"task": "task", "greedy": "greedy (%)", "sampled": "sampled (%)"}
    return markdown(pd.read_csv(results / "smollm2" / "tasks.csv"), titles)


def laptop_nats_table(results: Path) -> str:
    """What the students of profiles/laptop.yaml made of their nats: a row per run."""
    nats = {"cost": "mean cost (nats)", "useful_at_least": "useful, at least (nats)"}
    titles = {"run": "run"} | nats | {"ceiling": "ceiling at that cost (%)", "accuracy": "right in every step (%)"}
    titles |= {"share": "share of the ceiling (%)"}
    table = pd.read_csv(results / "laptop-gpu" / "ceiling.csv")
    return markdown(table.assign(**{name: table[name].map("{:.2f}".format) for name in nats}), titles)


def laptop_examples_table(results: Path, count: int = 8, seed: int = 0) -> str:
    """Completions before and after training, of prompts drawn by `seed`: a row per prompt."""
    runs = {"before": "sft", "gkd": "gkd", "grpo": "grpo", "cmdp-chance": "cmdp-chance"}
    texts = {name: pd.read_csv(results / "laptop-gpu" / "texts" / run / "0.csv") for name, run in runs.items()}
    firsts = pd.DataFrame({name: table.groupby("prompt")["completion"].first() for name, table in texts.items()})
    drawn = firsts.sample(count, random_state=seed).map(lambda text: f"`{text.strip()}`".replace("\n", "; "))
    asked = drawn.index.str.partition("user\n").get_level_values(2).str.partition("<|im_end|>").get_level_values(0)
    return markdown(drawn.assign(problem=asked), {"problem": "problem"} | {name: name for name in runs})


FILES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"gain": gain_table, "results": default_table, "laptop": laptop_table, "verdicts": verdicts_table},
    "docs/study.md": {
        "contest": contest_table,
        "study": study_table,
        "rebuilt": rebuilt_table,
        "equal": equal_table,
        "claims": claims_table,
        "benchmark": benchmark_table,
    },
    "docs/theory.md": {"theory": theory_table},
    "docs/models.md": {
        "tasks": laptop_tasks_table,
        "ceiling": laptop_ceiling_table,
        "laptop": laptop_table,
        "steps": laptop_steps_table,
        "equal": laptop_equal_table,
        "costs": laptop_costs_table,
        "memory": laptop_memory_table,
        "cpu": partial(laptop_table, name="laptop"),
        "nats": laptop_nats_table,
        "examples": laptop_examples_table,
        "gpu": gpu_table,
    },
}
