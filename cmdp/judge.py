"""Pairwise reasoning win rate, by a judge behind any OpenAI-compatible endpoint (method, section 8).

Each pair of completions of one problem is judged twice, once in either order, since judges prefer a position; a tie
counts half. Every reply is kept on disk as it comes, so that an interrupted run goes on where it was and a finished one
is repeated without a call. The API key is read from JUDGE_API_KEY; it goes to the endpoint and nowhere else.
"""

import hashlib
import http.client
import json
import os
import random
import re
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from string import Template
from threading import Event, Lock
from typing import NamedTuple

import numpy as np
import pandas as pd

from cmdp.statistics import interval
from cmdp.storage import write_json, write_table

KEY = "JUDGE_API_KEY"
ATTEMPTS = 6
BACKOFF, LONGEST = 1.0, 60.0  # seconds before the second attempt, doubled at each; and at most
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}

_VERDICT = re.compile(r"\[\[\s*(?:solution\s*)?(1|2|tie)\s*\]\]|verdict\W+(?:solution\s*)?(1|2|tie)\b", re.IGNORECASE)


class Endpoint(NamedTuple):
    """Where the judge is and how it is asked."""

    url: str  # the base, as the clients of OpenAI take it: http://localhost:8000/v1
    model: str
    options: dict = {"temperature": 0, "max_tokens": 512}  # fields of every request
    timeout: float = 120.0  # seconds


def judge(a: pd.DataFrame, b: pd.DataFrame, endpoint: Endpoint, template: str, folder: Path, concurrency: int) -> dict:
    """Judge the completions of run A against those of run B; how often is A's reasoning the better?

    Args:
        a, b: completions with `prompt` (the problem's text), `completion` and, optionally, `sample` (its index among
            the prompt's; without it, their order).
        template: the judge's prompt (judge_prompt.txt is one), with $problem, $first and $second.
        folder: where `replies.jsonl` (every reply, as it comes), `verdicts.csv` (a row a pair) and `summary.json` go.
        concurrency: requests at a time, at most.

    Returns:
        The summary: `win_rate` of A, a mean over prompts with its 95 % bootstrap interval, over the pairs with a
        verdict in both orders; `agreement`, the share of those whose two verdicts are the same; `first`, the share of
        decided verdicts for the solution shown first; and the counts that say what was left out.

    Raises:
        ValueError: tables, template or endpoint are not as above, or no pair has a verdict in both orders.
        ConnectionError: the endpoint refused, or failed at every attempt. What it answered is kept.
    """
    missing = [name for name in ("$problem", "$first", "$second") if name not in template]
    if missing:
        raise ValueError(f"The judge's prompt lacks {', '.join(missing)}.")
    pairs, unpaired = paired(a, b)
    same = pairs["completion_a"] == pairs["completion_b"]
    for order, (first, second) in {"a_first": ("a", "b"), "b_first": ("b", "a")}.items():
        pairs[order] = [
            Template(template).substitute(problem=problem, first=one, second=other)
            for problem, one, other in zip(
                pairs["prompt"], pairs[f"completion_{first}"], pairs[f"completion_{second}"], strict=True
            )
        ]
    prompts = pd.concat([pairs.loc[~same, "a_first"], pairs.loc[~same, "b_first"]]).tolist()
    replies = ask(endpoint, prompts, folder / "replies.jsonl", concurrency)
    for order, ours in (("a_first", "1"), ("b_first", "2")):
        said = [None if alike else verdict(replies[text]) for text, alike in zip(pairs[order], same, strict=True)]
        # what A earns by this verdict; the same text twice is a tie that needs no judge
        worth = [None if word is None else 0.5 if word == "tie" else float(word == ours) for word in said]
        pairs[order] = pd.Series(worth, index=pairs.index, dtype=float).mask(same, 0.5)
    return _written(pairs, same, unpaired, endpoint, template, folder)


def _written(
    pairs: pd.DataFrame, same: pd.Series, unpaired: int, endpoint: Endpoint, template: str, folder: Path
) -> dict:
    """Write the verdicts and their summary; return the summary."""
    pairs["score"] = pairs[["a_first", "b_first"]].mean(axis=1, skipna=False)
    pairs.insert(0, "problem", pairs.groupby("prompt", sort=False).ngroup())
    write_table(pairs[["problem", "sample", "a_first", "b_first", "score"]], folder / "verdicts.csv")
    judged = pairs[pairs["score"].notna()]
    without = int(pairs[["a_first", "b_first"]].isna().sum().sum())
    if judged.empty:
        raise ValueError(f"No pair has a verdict in both orders: {without} replies had none. See {folder}.")
    mean, low, high = interval(judged.groupby("prompt", sort=False)["score"].mean().to_numpy()[np.newaxis])
    asked = judged[~same[judged.index]]
    shown_first = pd.concat([pairs["a_first"], 1 - pairs["b_first"]])[lambda worth: worth.isin([0, 1])]
    summary = {
        "win_rate": {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)},
        "wins": int((judged["score"] > 0.5).sum()),
        "ties": int((judged["score"] == 0.5).sum()),
        "losses": int((judged["score"] < 0.5).sum()),
        "agreement": round(float((asked["a_first"] == asked["b_first"]).mean()), 4) if len(asked) else None,
        "first": round(float(shown_first.mean()), 4) if len(shown_first) else None,
        "prompts": int(judged["prompt"].nunique()),
        "pairs": len(pairs),
        "pairs_left_out": len(pairs) - len(judged),
        "replies_without_verdict": without,
        "identical_pairs": int(same.sum()),
        "unpaired_completions": unpaired,
        "model": endpoint.model,
        "endpoint": endpoint.url,
        "options": endpoint.options,
        "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    write_json(summary, folder / "summary.json")
    return summary


def read_completions(path: Path) -> pd.DataFrame:
    """A table of completions, all text. Raises `FileNotFoundError` or, where a column lacks, `ValueError`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no table of completions at {path}.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in ("prompt", "completion") if column not in table]
    if missing:
        raise ValueError(f"{path} has no column {' and no column '.join(missing)}: it has {', '.join(table)}.")
    return table


def paired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """(pairs of completions of one prompt and sample index, how many completions found no partner)."""
    tables = []
    for name, table in (("A", a), ("B", b)):
        sample = table["sample"] if "sample" in table else table.groupby("prompt").cumcount()
        table = table[["prompt", "completion"]].assign(sample=sample.astype(int))
        if table.duplicated(["prompt", "sample"]).any():
            raise ValueError(f"Run {name} has several completions of one prompt with one sample index.")
        tables.append(table)
    pairs = tables[0].merge(tables[1], on=["prompt", "sample"], suffixes=("_a", "_b"))
    if pairs.empty:
        raise ValueError("The two runs have no prompt in common: both must complete the same problems.")
    return pairs, len(a) + len(b) - 2 * len(pairs)


def verdict(reply: str) -> str | None:
    """ "1", "2" or "tie", from the reply's last line; None where that says nothing, or more than one thing."""
    lines = [line for line in reply.rpartition("</think>")[2].splitlines() if line.strip()]
    found = {one or other for one, other in _VERDICT.findall(lines[-1].lower())} if lines else set()
    return found.pop() if len(found) == 1 else None


# ---- asking, once each ----


def ask(endpoint: Endpoint, prompts: list[str], path: Path, concurrency: int) -> dict[str, str]:
    """The judge's reply to each prompt: those that the file at `path` has, and the others from the endpoint.

    A reply is appended to the file, a line each, before it counts; a line cut off by a crash is dropped.
    """
    key = os.environ.get(KEY, "").strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{KEY} holds something that is no API key.")
    address = urllib.parse.urlsplit(endpoint.url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"The endpoint is a URL such as http://localhost:8000/v1, not {endpoint.url!r}.")
    if address.username or address.password or address.query:
        raise ValueError(f"The endpoint's URL is written to disk, so it must hold no secret: put the key in {KEY}.")

    known = read_replies(path)
    digests = {prompt: digest(endpoint, prompt) for prompt in prompts}
    to_ask = [prompt for prompt in digests if digests[prompt] not in known]
    print(f"{len(digests)} requests: {len(digests) - len(to_ask)} answered before, {len(to_ask)} to ask", flush=True)
    if not to_ask:
        return {prompt: known[digests[prompt]] for prompt in digests}
    writing, stop = Lock(), Event()
    with open(path, "a", encoding="utf-8") as lines, ThreadPoolExecutor(concurrency) as pool:

        def answer(prompt: str) -> None:
            if stop.is_set():
                return
            try:
                reply, reason = _request(endpoint, prompt, key, stop)
            except Exception:
                stop.set()
                raise
            record = {"key": digests[prompt], "model": endpoint.model, "finish_reason": reason, "reply": reply}
            with writing:
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
                known[digests[prompt]] = reply

        asked = [pool.submit(answer, prompt) for prompt in to_ask]
        try:
            for done in as_completed(asked):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)  # what is under way is answered, and kept
            raise
    return {prompt: known[digests[prompt]] for prompt in digests}


def digest(endpoint: Endpoint, prompt: str) -> str:
    """What a reply is kept under: everything that it depends on."""
    asked = [endpoint.url.rstrip("/"), _body(endpoint, prompt)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_replies(path: Path) -> dict[str, str]:
    """The replies kept at `path`, by digest. A last line that a crash cut off is removed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    records = (json.loads(line) for line in whole.splitlines())
    return {record["key"]: record["reply"] for record in records}


def _body(endpoint: Endpoint, prompt: str) -> dict:
    return {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}], **endpoint.options}


class _StayThere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would take the key along to another host."""

    def redirect_request(self, *_):
        return None


def _request(endpoint: Endpoint, prompt: str, key: str, stop: Event) -> tuple[str, str | None]:
    """(the reply's text, why it ended), after as many attempts as it takes, up to `ATTEMPTS`; none after `stop`."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = endpoint.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(_body(endpoint, prompt)).encode(), headers)
    opener = urllib.request.build_opener(_StayThere)
    for attempt in range(ATTEMPTS):
        asked_to_wait = 0.0
        try:
            with opener.open(request, timeout=endpoint.timeout) as response:
                choice = json.load(response)["choices"][0]
                return choice["message"]["content"] or "", choice.get("finish_reason")
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in TRY_AGAIN:
                break
            with_number = re.fullmatch(r"\s*(\d+)\s*", error.headers.get("Retry-After", ""))
            asked_to_wait = float(with_number[1]) if with_number else 0.0
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
            problem = repr(error)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"an answer that is no chat completion ({error!r})"
        seconds = min(LONGEST, max(asked_to_wait, BACKOFF * 2**attempt) * random.uniform(1.0, 1.25))
        if attempt + 1 == ATTEMPTS or stop.wait(seconds):
            break
    problem = problem.replace(key, "<key>") if key else problem
    raise ConnectionError(f"{endpoint.url} gave {problem}. Its earlier replies are kept: the same command goes on.")
