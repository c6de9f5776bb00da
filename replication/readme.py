"""The README's generated tables: written between markers, from results files."""

import json
from pathlib import Path

import pandas as pd

from cmdp.collect import gather
from cmdp.statistics import with_budget
from cmdp.storage import read_yaml
from replication.tables import difference
from replication.theory import OURS
from replication.theory.tables import percent, sampled_learners
from replication.tune import best

COLUMNS = {
    "accuracy": "right answers (%)",
    "csr": "within budget (%)",
    "accuracy_within": "both (%)",
    "validity": "every step right (%)",
    "cost": "mean cost (nats)",
}


def results_table(summary: pd.DataFrame) -> str:
    """The summary as a Markdown table: a row a run, mean with its 95 % interval."""
    table = summary.set_index(["run", "measure"])
    seeds = summary["seeds"].max()
    lines = ["| run | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for run in summary["run"].unique():
        row = [_cell(table.loc[(run, measure)], 1 if measure == "cost" else 100) for measure in COLUMNS]
        lines.append(f"| {run} | " + " | ".join(row) + " |")
    lines.append("")
    lines.append(f"Held-out prompts, sampled at temperature 1; {seeds} seeds; in brackets 95 % bootstrap intervals.")
    return "\n".join(lines)


def paired_table(completions: pd.DataFrame, trials: pd.DataFrame, budget: dict) -> str:
    """The constrained methods minus the soft Lagrangian that did best on validation prompts, as a Markdown table.

    Args:
        completions: of all runs and seeds.
        trials: of tuning, which names the soft Lagrangian.
        budget: `budget` and `budget_form`.
    """
    rival = best(trials, "gkd-grpo")
    sampled = with_budget(completions[completions["decoding"] == "sampled"], **budget)
    measures = {"correct": "accuracy", "satisfied": "csr", "correct_within": "accuracy_within"}
    if rival not in set(sampled["run"]):
        return f"`{rival}`, the soft Lagrangian to compare with, was not run."
    lines = [f"| minus {rival}, paired | " + " | ".join(COLUMNS[name] for name in measures.values()) + " |"]
    lines.append("|---" * (len(measures) + 1) + "|")
    for run in [run for run in sampled["run"].unique() if run.startswith("cmdp")]:
        ours, theirs = (sampled[sampled["run"] == name] for name in (run, rival))
        row = []
        for column in measures:
            mean, low, high, _ = difference(ours, theirs, column)
            row.append(f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        lines.append(f"| {run} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def wide(table: pd.DataFrame, index: str, columns: str, value: str = "mean") -> pd.DataFrame:
    """A long table of shares laid out for reading, in its own order: per cent, with intervals in brackets."""
    shown = [_cell(row, 100) for _, row in table.rename(columns={value: "mean"}).iterrows()]
    laid_out = table.assign(shown=shown).pivot(index=index, columns=columns, values="shown")
    return laid_out.loc[table[index].unique(), table[columns].unique()].fillna("")


def _cell(row: pd.Series, scale: int, digits: int = 1) -> str:
    mean, low, high = (f"{scale * row[name]:z.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def theory_table(results: Path) -> str:
    """Learners on token trees against the exact optimum: a row a method, with 95 % intervals."""
    table = sampled_learners(results)
    table = table.rename(index={"soft optimum, never": "*soft Lagrangian, best λ per tree, exact*"})
    ours = {method: f"{method} (ours)" for method in OURS}
    table = table[~table.index.str.startswith("soft optimum")].rename(index=ours)
    lines = ["| learner | reward, % of the optimum's | within budget (%) |", "|---|---|---|"]
    for method, reward, csr in zip(table.index, percent(table, "of_optimum"), percent(table, "csr"), strict=True):
        lines.append(f"| {method} | {reward} | {csr} |")
    shares = json.loads((results / "summary.json").read_text(encoding="utf-8"))["results"]["mean_is_not_enough"]
    least, median, most = (f"{100 * shares[name]:.0f}" for name in ("min", "median", "max"))
    lines.append("")
    trees = table["trees"].iloc[0]
    lines.append(f"{trees} held-out trees, all budgets; in brackets 95 % bootstrap intervals over trees. The best soft")
    lines.append(
        f"Lagrangian that meets the budget on average leaves {least} to {most} % of a tree's trajectories over it"
    )
    lines.append(f"(median {median} %).")
    return "\n".join(lines)


def claims_table(verdicts: pd.DataFrame) -> str:
    """The claims and their verdicts as a Markdown table."""
    lines = ["| | claim | published | verdict here | evidence | conditions |", "|---" * 6 + "|"]
    for row in verdicts.itertuples():
        cells = (row.id, row.claim, row.published, f"**{row.verdict}**", row.evidence, row.conditions)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def study_table(summary: pd.DataFrame) -> str:
    """Every method of the study as a Markdown table: a row an arm, mean with its 95 % interval."""
    methods = summary[summary["family"] == "method"]
    table = methods.set_index(["arm", "measure"])
    columns = COLUMNS | {"lucky": "right by wrong steps (%)", "longer_accuracy": "right on longer problems (%)"}
    lines = ["| arm | seeds | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm in methods["arm"].unique():
        row = [_cell(table.loc[(arm, measure)], 1 if measure == "cost" else 100) for measure in columns]
        lines.append(f"| {arm} | {table.loc[(arm, 'accuracy'), 'seeds']} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def laptop_table(results: Path) -> str:
    """What a run of profiles/laptop.yaml measured as a Markdown table: a row a method, and what it was run on."""
    table = pd.read_csv(results / "summary.csv").set_index(["run", "measure"])
    times = pd.read_csv(results / "timing.csv").set_index("run")
    profile = read_yaml(results / "profile.yaml")
    memory = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "memory").glob("*/*.json"))]
    measures = {"accuracy": COLUMNS["accuracy"], "csr": COLUMNS["csr"], "kl_per_token": "nats a token"}
    measures |= {"cost": COLUMNS["cost"]}
    phases = ("generation", "scoring", "update")
    lines = ["| run | " + " | ".join(measures.values()) + " | seconds a step: " + ", ".join(phases) + " |"]
    lines.append("|---" * (len(measures) + 2) + "|")
    for run in table.index.unique("run"):
        row = [
            _cell(table.loc[(run, name)], 100 if "%" in title else 1, 3 if name == "kl_per_token" else 1)
            for name, title in measures.items()
        ]
        seconds = [times.loc[run, f"time/{phase}"] for phase in phases] if run in times.index else []
        row.append(", ".join(f"{second:.0f}" for second in seconds if second == second) or "-")
        lines.append(f"| {run} | " + " | ".join(row) + " |")
    train, budget, evaluated = profile["train"], profile["budget"]["budget"], profile["evaluate"]
    threads = f", {memory[0]['threads']} thread(s) a run" if train.get("use_cpu") else ""
    batch = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    seeds = ", ".join(map(str, profile["seeds"]))
    taken, summed = (max(entry[key] for entry in memory) for key in ("taken_gib", "summed_gib"))
    lines += [
        "",
        f"{train['max_steps']} steps of {batch} completions of at most "
        f"{train['max_completion_length']} tokens, a budget of {budget} nats a token; measured on "
        f"{evaluated['prompts']} held-out prompts, {evaluated['samples']} completions each; seed {seeds}. On "
        f"{memory[0]['device']}{threads}; memory {taken:.1f} GiB, {summed:.1f} by the sum.",
    ]
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced. Raises `ValueError` where a marker is missing."""
    begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"README.md lacks the markers of {name!r}: {begin.strip()} ... {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{content}\n{end}{rest.partition(end)[2]}"


def readme(text: str, results: Path, params: dict) -> str:
    """The README with every generated table filled in from `results`; the study's only where it has been run."""
    completions = gather(results / "runs", params)
    text = fill(text, "results", results_table(pd.read_csv(results / "summary.csv")))
    text = fill(text, "paired", paired_table(completions, pd.read_csv(results / "tuning.csv"), params["budget"]))
    if (results / "study" / "claims.csv").is_file():
        text = fill(text, "study", study_table(pd.read_csv(results / "study" / "summary.csv")))
        text = fill(text, "claims", claims_table(pd.read_csv(results / "study" / "claims.csv")))
    if (results / "laptop" / "profile.yaml").is_file():
        text = fill(text, "laptop", laptop_table(results / "laptop"))
    return fill(text, "theory", theory_table(results / "theory"))
