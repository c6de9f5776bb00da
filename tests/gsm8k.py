"""Hold the answer verifier and the step checker against GSM8K's own solutions: makes results/gsm8k/check.json.

python tests/gsm8k.py FOLDER      # of train.jsonl and test.jsonl, or openai/gsm8k
"""

import random
import re
import sys
from pathlib import Path

from cmdp import tasks
from cmdp.storage import write_json
from cmdp.tasks import answers, gsm, steps

TABLE = Path(__file__).parents[1] / "results/gsm8k/check.json"
_NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+")


def check_gsm8k(source: str | Path, seed: int = 0) -> dict:
    """Measure both on all solutions of GSM8K at `source`, the Hub's name or a folder (see `cmdp.tasks.read`).

    Returns:
        `problems`; `accepted`, solutions that `is_correct` accepts; `refused`, solutions that it refuses for the answer
        of the next problem that has another; `valid`, solutions by `steps_are_valid`; `annotations` and `equations` (in
        the text without annotations): how many are `read`, `unread` and `wrong`; `mutations`: right equations in which
        one digit, drawn by `seed`, is changed, and the share `caught`; `flagged`: wrong equations with split and row.
    """
    rng = random.Random(seed)
    counts = dict.fromkeys(("problems", "accepted", "refused", "valid"), 0)
    annotated, written = ({"read": 0, "unread": 0, "wrong": 0} for _ in range(2))
    flagged, caught, data = [], [], tasks.read(source)
    for split in ("train", "test"):
        rows = data[split]
        golds = [gsm.parse(row)["answer"] for row in rows]
        for index, (row, gold) in enumerate(zip(rows, golds, strict=True)):
            solution = row["answer"]
            other = next((g for g in golds[index + 1 :] + golds if answers.number(g) != answers.number(gold)), "")
            counts["problems"] += 1
            counts["accepted"] += gsm.is_correct(solution, gold)
            counts["refused"] += not gsm.is_correct(solution, other)
            counts["valid"] += gsm.steps_are_valid(solution, row["question"])
            for annotation in steps.annotations(solution):
                is_read = isinstance(annotation, steps.Equation)
                annotated["read" if is_read else "unread"] += 1
                annotated["wrong"] += is_read and not annotation.holds
            written["unread"] += steps.coverage(solution)[1]
            for equation in steps.equations(solution):
                written["read"] += 1
                if equation.holds:
                    caught.append(_is_caught(f"{equation.left} = {equation.right}", rng))
                else:
                    written["wrong"] += 1
                    flagged.append(f"{split} {index + 1}: {equation.left} = {equation.right}")
    mutations = {"equations": len(caught), "caught": sum(caught) / max(1, len(caught))}
    return {**counts, "annotations": annotated, "equations": written, "mutations": mutations, "flagged": flagged}


def _is_caught(equation: str, rng: random.Random) -> bool:
    """Whether an equation is found wrong once a digit of one of its numbers, both drawn, is another."""
    number = rng.choice(list(_NUMBER.finditer(equation)))
    place = rng.choice([i for i in range(*number.span()) if equation[i].isdigit()])
    digit = rng.choice([digit for digit in "123456789" if digit != equation[place]])
    found = steps.equations(equation[:place] + digit + equation[place + 1 :])
    return bool(found) and not all(equation.holds for equation in found)


if __name__ == "__main__":
    write_json(check_gsm8k(sys.argv[1]), TABLE)
    print(TABLE)
