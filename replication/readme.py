"""Generated tables of README.md and docs/: written between markers, from results files alone."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from cmdp.storage import read, read_yaml, write_text
from replication.experiments import RESULTS, gather, rows
from replication.theory import OURS
from replication.theory.tables import percent, sampled_learners

COLUMNS = {"accuracy": "accuracy (%)", "csr": "CSR (%)", "accuracy_within": "accuracy within budget (%)"}
COLUMNS |= {"greedy_accuracy": "greedy accuracy (%)", "cost": "mean cost (nats)"}
DIGITS = {"cost": 2, "kl_per_token": 3}  # after the point; else 1
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


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def cell(row: pd.Series, scale: int = 100, digits: int = 1) -> str:
    """A mean with its interval: `97.1 [96.5, 97.6]`."""
    mean, low, high = (f"{scale * row[name]:z.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def compared(row: pd.Series, before: str = "") -> str:
    """A difference of shares in points with its interval: `+4.5 [+2.9, +6.1]`; the columns begin with `before`."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * row[f"{before}{end}"] for end in ("difference", "low", "high")))


def percents(row: pd.Series, *names) -> list[str]:
    """Shares in per cent."""
    return [f"{100 * row[name]:z.1f}" for name in names]


def wide(table: pd.DataFrame, index: str, columns: str, value: str = "mean") -> pd.DataFrame:
    """A long table of shares laid out for reading, in its own order: per cent, with intervals in brackets."""
    shown = table.assign(mean=table[value]).apply(cell, axis=1)
    laid_out = table.assign(shown=shown).pivot(index=index, columns=columns, values="shown")
    return laid_out.loc[table[index].unique(), table[columns].unique()].fillna("")


def measures_table(summary: pd.DataFrame, columns: dict[str, str], before: tuple[str, ...] = ()) -> str:
    """A row per run: its `before` columns, and each measure of `columns` with its interval, or - where it has none."""
    shown = summary[summary["measure"].isin(columns)].copy()
    units = [(100 if "%" in columns[name] else 1, DIGITS.get(name, 1)) for name in shown["measure"]]
    shown["shown"] = [cell(row, *unit) for (_, row), unit in zip(shown.iterrows(), units, strict=True)]
    wide = shown.pivot(index="run", columns="measure", values="shown").reindex(columns=columns).fillna("-")
    wide = shown.groupby("run", sort=False)[list(before)].first().astype(str).join(wide)
    return markdown(["run", *before, *columns.values()], wide.reset_index().to_numpy().tolist())


def results_table(summary: pd.DataFrame) -> str:
    """An experiment's summary: a row per run, mean with its 95 % interval."""
    note = "Held-out prompts, sampled at temperature 1 unless greedy; {} seeds; in brackets 95 % bootstrap intervals."
    return f"{measures_table(summary, COLUMNS)}\n\n{note.format(summary['seeds'].max())}"


def default_table(results: Path) -> str:
    """The default experiment's summary, with the sizes of its models."""
    sizes = gather("times", rows(), results / "runs").drop_duplicates("run").set_index("run")["parameters"]
    table = results_table(pd.read_csv(results / "summary.csv"))
    return f"{table} The student has {sizes['sft']:,} parameters, the teacher {sizes['teacher']:,}."


def gain_table(results: Path) -> str:
    """Our constrained method at each budget: what it gained over the soft Lagrangian, and what there was to gain."""
    ours, table = read_yaml(results / "chosen.yaml")["best"]["ours"], pd.read_csv(results / "study" / "equal_csr.csv")
    exact = pd.read_csv(results / "contest.csv").query("experiment == 'measured'").set_index("budget")["gap"]
    lines = [
        [f"{row['budget']:g} nats", *percents(row, "csr", "accuracy"), compared(row), *percents(exact, row["budget"])]
        for _, row in table[table["method"] == ours].sort_values("budget").iterrows()
    ]
    columns = ["CSR (%)", "accuracy (%)", "points more than the soft Lagrangian at that CSR", "points to be won, exact"]
    return markdown([f"`{ours}` within", *columns], lines)


def claims_table(results: Path, columns: tuple[str, ...] = ("evidence", "conditions")) -> str:
    """The claims with their verdicts, and with `columns` of results/claims.csv."""
    claims = pd.read_csv(results / "claims.csv")[["id", "claim", "published", "verdict", *columns]]
    lines = claims.assign(verdict="**" + claims["verdict"] + "**").to_numpy().tolist()
    return markdown(["", "claim", "published", "verdict here", *columns], lines)


def study_table(results: Path) -> str:
    """Every method of the study: a row per run, mean with its 95 % interval."""
    summary = pd.read_csv(results / "study" / "summary.csv")
    return measures_table(summary[summary["family"] == "method"], COLUMNS, ("seeds",))


def contest_table(results: Path) -> str:
    """What a constraint on trajectories can add, exactly: a row per experiment and budget."""
    table, shares = pd.read_csv(results / "contest.csv"), ["teacher", "ceiling", "budgeted", "soft", "gap"]
    lines = [
        [CONTESTS.get(row["experiment"], row["experiment"]), f"{row['budget']:g}", *percents(row, *shares)]
        for _, row in table.iterrows()
    ]
    columns = ["teacher (%)", "ceiling (%)", "budgeted optimum (%)", "best soft Lagrangian (%)", "gap (points)"]
    return markdown(["experiment", "budget (nats)", *columns], lines)


def equal_table(results: Path) -> str:
    """Each constrained method at each budget against the soft Lagrangian's curve, and against its best lambda."""
    lines = []
    for _, row in pd.read_csv(results / "study" / "equal_csr.csv").sort_values("budget", kind="stable").iterrows():
        lam = "-" if pd.isna(row["soft_lambda"]) else f"{compared(row, 'target_')} (λ = {row['soft_lambda']:g})"
        more = "looser than every λ" if row["place"] == "looser" else compared(row)
        more += ", stricter than every λ" * (row["place"] == "stricter")
        lines.append([row["method"], f"{row['budget']:g}", *percents(row, "accuracy", "csr"), more, lam])
    columns = ["accuracy (%)", "CSR (%)", "points more than soft at its CSR", "than the best λ that keeps 95 %"]
    return markdown(["method", "budget (nats)", *columns], lines)


def theory_table(results: Path) -> str:
    """Learners on token trees against the exact optimum: a row per method, with 95 % intervals."""
    names = {"soft optimum, never": "*soft Lagrangian, best λ per tree, exact*"}
    table = sampled_learners(results / "theory").rename(index=names | {name: f"{name} (ours)" for name in OURS})
    table = table[~table.index.str.startswith("soft optimum")]
    lines = zip(table.index, percent(table, "of_optimum"), percent(table, "csr"), strict=True)
    found = json.loads((results / "theory" / "summary.json").read_text(encoding="utf-8"))["results"]
    least, median, most = (f"{100 * found['mean_is_not_enough'][name]:.0f}" for name in ("min", "median", "max"))
    return (
        markdown(["learner", "reward, % of the optimum's", "CSR (%)"], lines)
        + f"\n\n{table['trees'].iloc[0]} held-out trees, all budgets; in brackets 95 % bootstrap intervals over trees. "
        f"The best soft\nLagrangian that meets the budget on average leaves {least} to {most} % of a tree's "
        f"trajectories over it\n(median {median} %)."
    )


def laptop_table(results: Path) -> str:
    """The measures of profiles/laptop.yaml: a row per run, and what it was run on."""
    folder, phases = results / "laptop", ("generation", "scoring", "update")
    summary, times = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "timing.csv").set_index("run")
    memory, made = [*map(read, sorted((folder / "memory").glob("*/*.json")))], read(folder / "provenance.json")
    for phase in phases:
        seconds = summary["run"].map(times[f"time/{phase}"])
        summary[f"{phase} (s)"] = seconds.map("{:.2g}".format, na_action="ignore").fillna("-")
    columns = {name: COLUMNS[name] for name in ("accuracy", "greedy_accuracy", "csr")}
    columns |= {"kl_per_token": "nats per token", "cost": COLUMNS["cost"]}
    table = measures_table(summary, columns, tuple(f"{phase} (s)" for phase in phases))
    profile = read_yaml(folder / "profile.yaml")
    train, evaluated = profile["train"], profile["evaluate"]
    batch = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    taken, summed = (max(entry[key] for entry in memory) for key in ("taken_gib", "summed_gib"))
    threads = f", {memory[0]['threads']} thread(s) per run" if made["device"] == made["processor"] else ""
    form = "nats per token" if profile["budget"]["budget_form"] == "per_token" else "nats"
    return (
        f"{table}\n\n{train['max_steps']} steps of {batch} completions of at most {train['max_completion_length']} "
        f"tokens, timed per step; a budget of {profile['budget']['budget']} {form}; {evaluated['prompts']} held-out "
        f"prompts, {evaluated['samples']} completions each; seeds: {summary['seeds'].max()}; in brackets 95 % "
        f"bootstrap intervals. On {memory[0]['device']}{threads}; memory {taken:.1f} GiB, {summed:.1f} by the sum."
    )


def laptop_ceiling_table(results: Path) -> str:
    """What each budget buys on the prompts of profiles/laptop.yaml: a row per budget."""
    table, shares = pd.read_csv(results / "smollm2" / "ceiling.csv"), ["ceiling", "budgeted", "soft"]
    lines = [[f"{row['budget']:g}", *percents(row, *shares)] for _, row in table.iterrows()]
    teacher = 100 * pd.read_csv(results / "smollm2" / "chains.csv").prod(axis=1).mean()
    columns = ["budget (nats)", "ceiling (%)", "budgeted optimum (%)", "best soft Lagrangian at CSR 95 % (%)"]
    return f"{markdown(columns, lines)}\n\nThe teacher's own accuracy, sampled, is {teacher:.1f} %."


def laptop_tasks_table(results: Path) -> str:
    """What SmolLM2-135M-Instruct knows before any training: a row per task."""
    table = pd.read_csv(results / "smollm2" / "tasks.csv")
    lines = [[row["task"], *percents(row, "greedy", "sampled")] for _, row in table.iterrows()]
    return markdown(["task", "greedy (%)", "sampled (%)"], lines)


def laptop_examples_table(results: Path, count: int = 4, seed: int = 0) -> str:
    """Completions before and after training, of prompts drawn by `seed`: a row per prompt."""
    runs = {"before": "sft", "gkd": "gkd", "grpo": "grpo", "cmdp-chance": "cmdp-chance"}
    texts = {name: pd.read_csv(results / "laptop" / "texts" / run / "0.csv") for name, run in runs.items()}
    firsts = pd.DataFrame({name: table.groupby("prompt")["completion"].first() for name, table in texts.items()})
    lines = []
    for prompt, row in firsts.sample(count, random_state=seed).iterrows():
        asked = prompt.partition("user\n")[2].partition("<|im_end|>")[0]
        lines.append([asked, *(f"`{text.strip()}`".replace("\n", "; ") for text in row)])
    return markdown(["problem", *runs], lines)


FILES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"gain": gain_table, "results": default_table, "verdicts": partial(claims_table, columns=())},
    "docs/study.md": dict(contest=contest_table, study=study_table, equal=equal_table, claims=claims_table),
    "docs/theory.md": {"theory": theory_table},
    "docs/models.md": {
        "tasks": laptop_tasks_table,
        "ceiling": laptop_ceiling_table,
        "laptop": laptop_table,
        "examples": laptop_examples_table,
    },
}
