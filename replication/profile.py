"""One command for a machine with a GPU: `make gpu PROFILE=gsm8k` trains and measures a profile and judges C4 or C5.

Before weights load the memory is summed and checked; after two steps of a run the time that is left is said; what is
finished is not done again, and an interrupted run goes on. results/PROFILE is then ready to commit.
"""

from pathlib import Path

import pandas as pd

from cmdp import train
from cmdp.statistics import cells, interval, with_budget
from cmdp.storage import read_runs, write_table
from replication.claims import CLAIMS, NO, OPEN, UNTESTED, YES, gain, points, share
from replication.tables import difference

SHARE, KL = 0.962, 0.15  # C4: the published CSR, and the budget in nats per token at which it is
ALIKE = 0.05  # C5: the largest difference of CSR that is similar
JUDGED = {"gsm": "C4", "competition_math": "C5"}  # by task


def run(name: str, *overrides: str) -> None:
    """Train and measure all runs of profiles/NAME.yaml, and judge the claim that its task tests: results/NAME.
    `overrides` are such as "train.max_steps=5"; with "name=other" the results are results/other."""
    experiment = train.read(Path("profiles") / f"{name}.yaml", *overrides)
    train.run_all(experiment, [*experiment.runs], experiment.seeds)
    folder = train.RESULTS / experiment.name
    table = judged(experiment, read_runs(folder / "completions"))
    write_table(table, folder / "claims.csv")
    print(table.to_string(index=False))


def judged(experiment, completions: pd.DataFrame) -> pd.DataFrame:
    """`id`, `claim`, `published`, `verdict` and `evidence` of the claim that the experiment tests, on its runs of the
    paper's method, `cmdp`, and of `minillm`; not tested where it has not those, or another budget."""
    budget = experiment.budget
    found = with_budget(completions.query("decoding == 'sampled'"), **vars(budget))
    runs = {row["method"]: found[found["run"] == run] for run, row in experiment.runs.items()}
    identity = JUDGED.get(experiment.task["name"])
    claim = next((claim for claim in CLAIMS if claim["id"] == identity), None)
    if claim is None:
        return pd.DataFrame(columns=["id", "claim", "published", "verdict", "evidence"])
    verdict, evidence, models = UNTESTED, "", f"{experiment.student.model} from {experiment.teacher.model}"
    if identity == "C4" and "cmdp" in runs and (budget.budget_form, budget.budget) == ("per_token", KL):
        mean, low, high = interval(cells(runs["cmdp"], "satisfied"))
        verdict = YES if low >= SHARE else NO if high < SHARE else OPEN
        evidence = f"CSR {share((mean, low, high))} at {KL} nats per token; {models}"
    if identity == "C5" and {"cmdp", "minillm"} <= {*runs}:
        pair = runs["cmdp"], runs["minillm"]
        accuracy, csr = (difference(*pair, column)[:3] for column in ("correct", "satisfied"))
        alike = abs(csr[0]) <= ALIKE
        verdict = gain(*accuracy[1:], claim["gain"]) if alike else OPEN
        evidence = f"accuracy {points(accuracy)}, CSR {points(csr)}{', not similar' * (not alike)}; {models}"
    row = {"id": identity, "claim": claim["claim"], "published": claim["published"]}
    return pd.DataFrame([row | {"verdict": verdict, "evidence": evidence}])
