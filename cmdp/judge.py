"""Pairwise reasoning win rate by an LLM judge behind any OpenAI-compatible endpoint (method, section 8).

Each pair of completions is judged in both orders (position bias); a tie counts half. Every reply is appended to
replies.jsonl as it arrives: an interrupted run resumes, a finished one repeats without a call. The API key is read from
JUDGE_API_KEY, sent to the endpoint only, and never written.
"""

import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import NamedTuple

import pandas as pd

from cmdp.statistics import interval
from cmdp.storage import read, write_json, write_table
from cmdp.tasks.answers import THOUGHT, THOUGHT_END

KEY = "JUDGE_API_KEY"
RETRIES = 5  # by the client, with backoff or Retry-After: refused, reset, timed out, 408, 409, 429, 5xx
ORDERS = {"a_first": ("completion_a", "completion_b"), "b_first": ("completion_b", "completion_a")}
SCORES = {"1": 1.0, "tie": 0.5, "2": 0.0}  # of the solution shown first
_WORD = re.compile(r"\[\[\s*(?:solution\s*)?(1|2|tie)\s*\]\]|verdict\W+(?:solution\s*)?(1|2|tie)\b(?=(\W*$)?)")
_NO = r"(?:\b(?:no|not|nor|or|cannot|either|wors[et]|wrong|incorrect|los\w+|fail\w*)\b|n['’]t\b)"
_DENIED = re.compile(rf"{_NO}[^.,:;]*(?:\[\[|verdict)|\]\][^.,:;]*{_NO}")
_URL = re.compile(r"https?://(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[^?#@\s]*)?")


class Endpoint(NamedTuple):
    """Where the judge is and how it is asked."""

    url: str  # base URL, as for OpenAI's clients: http://localhost:8000/v1
    model: str
    options: dict = {"temperature": 0, "max_tokens": 512}  # fields of every request
    timeout: float = 120.0  # seconds


def judge(a: pd.DataFrame, b: pd.DataFrame, endpoint: Endpoint, template: str, folder: Path, concurrency: int) -> dict:
    """Judge the completions of run A against those of run B, with at most `concurrency` requests at a time.

    Args:
        a, b: completions: `prompt` (the problem's text), `completion` and optionally `sample` (index per prompt).
        template: the judge's prompt with $problem, $first and $second, as judge_prompt.txt.
        folder: receives `replies.jsonl`, `verdicts.csv` (one row per pair) and `summary.json`.

    Returns the summary: `win_rate` of A (mean over prompts, 95 % bootstrap interval) over pairs with a verdict in both
    orders; `agreement`, the share of those with the same verdict twice; `first`, the share of decided verdicts for the
    solution shown first; counts. Raises `ValueError` for malformed input or if no pair has a verdict in both orders,
    `ConnectionError` if the endpoint refused, or failed at every attempt (earlier replies are kept).
    """
    question = Template(template)
    if missing := [name for name in ("problem", "first", "second") if name not in question.get_identifiers()]:
        raise ValueError(f"The judge's prompt lacks ${', $'.join(missing)}.")
    pairs, unpaired = paired(a, b)
    same = pairs["completion_a"] == pairs["completion_b"]  # a tie without asking
    prompts = pairs[[]].copy()
    for order, (one, other) in ORDERS.items():
        named = pairs.rename(columns={"prompt": "problem", one: "first", other: "second"})
        prompts[order] = [question.safe_substitute(row) for row in named.to_dict("records")]
    replies = ask(endpoint, prompts[~same].melt()["value"].tolist(), folder / "replies.jsonl", concurrency)
    first = prompts.map(lambda text: SCORES.get(verdict(replies.get(text, "")))).astype(float).mask(same, 0.5)
    pairs[[*ORDERS]] = first.assign(b_first=1 - first["b_first"])  # scores of A, missing without a verdict
    pairs["score"] = pairs[[*ORDERS]].mean(axis=1, skipna=False)
    pairs.insert(0, "problem", pairs.groupby("prompt", sort=False).ngroup())
    write_table(pairs[["problem", "sample", *ORDERS, "score"]], folder / "verdicts.csv")

    judged, without = pairs.dropna(subset="score"), int(pairs[[*ORDERS]].isna().sum().sum())
    if judged.empty:
        raise ValueError(f"No pair has a verdict in both orders: {without} replies had none. See {folder}.")
    score, asked, decided = judged["score"], judged.loc[~same[judged.index]], first.melt()["value"]
    by_prompt = judged.groupby("prompt", sort=False)["score"].mean().to_numpy()[None]  # (1, prompts)
    shares = {"agreement": asked["a_first"] == asked["b_first"], "first": decided[decided.isin([0, 1])]}
    summary = {
        "win_rate": dict(zip(("mean", "low", "high"), (round(x, 4) for x in interval(by_prompt)), strict=True)),
        **{"wins": int((score > 0.5).sum()), "ties": int((score == 0.5).sum()), "losses": int((score < 0.5).sum())},
        **{name: round(float(share.mean()), 4) if len(share) else None for name, share in shares.items()},
        **{"prompts": by_prompt.size, "pairs": len(pairs), "pairs_left_out": len(pairs) - len(judged)},
        **{"replies_without_verdict": without, "identical_pairs": int(same.sum()), "unpaired_completions": unpaired},
        **endpoint._asdict(),
        "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    write_json(summary, folder / "summary.json")
    return summary


def read_completions(path: Path) -> pd.DataFrame:
    """A table of completions, all text. Raises `ValueError` for a missing or damaged file, or a missing column."""
    table = read(Path(path), dtype=str, keep_default_na=False)
    if missing := [column for column in ("prompt", "completion") if column not in table]:
        raise ValueError(f"{path} has no column {' and no column '.join(missing)}: it has {', '.join(table)}.")
    return table


def paired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """(pairs of completions with the same prompt and sample index, number of completions without a partner)."""
    tables = []
    for name, table in (("A", a), ("B", b)):
        sample = table["sample"] if "sample" in table else table.groupby("prompt").cumcount()
        tables.append(table[["prompt", "completion"]].assign(sample=sample.astype(int)))
        if tables[-1].duplicated(["prompt", "sample"]).any():
            raise ValueError(f"Run {name} has several completions of one prompt with one sample index.")
    pairs = pd.merge(*tables, on=["prompt", "sample"], suffixes=("_a", "_b"))
    if pairs.empty:
        raise ValueError("The two runs have no prompt in common: both must complete the same problems.")
    return pairs, len(a) + len(b) - 2 * len(pairs)


def verdict(reply: str) -> str | None:
    """ "1", "2" or "tie" from the last line with a word, after any thought; None if unclear or denied."""
    answer = THOUGHT_END.split(reply.lower())[-1]
    lines = ["", *(line for line in answer.splitlines() if re.search(r"\w", line))]  # a closing code fence has none
    found = [] if THOUGHT.search(answer) or _DENIED.search(lines[-1]) else list(_WORD.finditer(lines[-1]))
    clear = any(match[1] or match[3] is not None for match in found)  # in brackets, or the line's last word
    said = {match[1] or match[2] for match in found}
    return said.pop() if clear and len(said) == 1 else None


def ask(endpoint: Endpoint, prompts: list[str], path: Path, concurrency: int) -> dict[str, str]:
    """The judge's reply to each prompt: from the file at `path`, else from the endpoint and then appended to it."""
    key, known = _check(endpoint), read_replies(path)
    digests = {prompt: digest(endpoint, prompt) for prompt in prompts}
    to_ask = [prompt for prompt in digests if digests[prompt] not in known]
    print(f"{len(digests)} requests: {len(digests) - len(to_ask)} answered before, {len(to_ask)} to ask", flush=True)
    asker, failed = _asker(endpoint, key) if to_ask else None, threading.Event()

    def answer(prompt: str) -> None:
        if failed.is_set():  # requests under way finish and are kept; no other is made
            return
        try:
            reply = asker(prompt)
        except BaseException:
            failed.set()
            raise
        line = json.dumps({"key": digests[prompt], "model": endpoint.model, **reply}) + "\n"
        lines.write(line.encode())  # unbuffered and appended: whole, whichever thread writes
        os.fsync(lines.fileno())
        known[digests[prompt]] = reply["reply"]

    with open(path, "ab", buffering=0) as lines, ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(answer, to_ask))
    return {prompt: known[digests[prompt]] for prompt in digests}


def digest(endpoint: Endpoint, prompt: str) -> str:
    """The key that a reply is stored under: a hash of everything it depends on."""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}], **endpoint.options}
    return hashlib.sha256(json.dumps([endpoint.url.rstrip("/"), body], sort_keys=True).encode()).hexdigest()


def read_replies(path: Path) -> dict[str, str]:
    """The stored replies by digest; a last line cut off by a crash is removed. Raises `ValueError` for other damage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content, replies = path.read_bytes() if path.is_file() else b"", {}
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    for row, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            replies[record["key"]] = record["reply"] + ""  # raises unless text
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, row {row} is not a stored reply: delete this row to ask again.") from error
    return replies


def _check(endpoint: Endpoint) -> str:
    """The API key, or "". Raises `ValueError` for an endpoint that is malformed or would write a secret to disk."""
    key = os.environ.get(KEY, "").strip()
    if not isinstance(endpoint.options, dict):
        raise ValueError('The options of each request are a JSON object, such as {"temperature": 0}.')
    if re.search(r"[^!-~]", key) or hide(key, json.dumps(endpoint)) != json.dumps(endpoint):
        raise ValueError(f"{KEY} holds something that is no API key, or that the endpoint's URL or options repeat.")
    if not _URL.fullmatch(endpoint.url):
        raise ValueError(f"The endpoint is a URL like http://localhost:8000/v1, without user or query; the key: {KEY}.")
    return key


def hide(key: str, text: str) -> str:
    """`text` without the key, unless that is too short to be a secret (local servers accept anything)."""
    return text.replace(key, "<key>") if len(key) >= 8 else text


def _asker(endpoint: Endpoint, key: str):
    """A function of a prompt: `finish_reason` and `reply`, its text without the key, by OpenAI's client. It follows no
    redirect, which would take the key to another host, and sends nothing that the environment holds for OpenAI itself.
    It raises `ConnectionError` with one line."""
    try:
        from openai import DefaultHttpxClient, Omit, OpenAI
    except ImportError as error:
        raise ValueError("Asking a judge needs the package openai: `pip install openai`.") from error
    transport = {"timeout": endpoint.timeout, "http_client": DefaultHttpxClient(follow_redirects=False)}
    client = OpenAI(base_url=endpoint.url, api_key=key or "none", max_retries=RETRIES, **transport)
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {key}" if key else Omit()}
    headers = dict.fromkeys(client.default_headers, Omit()) | sent
    fixed = {"model": endpoint.model, "extra_body": endpoint.options, "extra_headers": headers}

    def reply(prompt: str) -> dict[str, str | None]:
        for _ in range(3):  # again where the answer is malformed
            try:
                message = {"role": "user", "content": prompt}
                choice = client.chat.completions.create(messages=[message], **fixed).choices[0]
                text = choice.message.content or ""
                if isinstance(text, list):  # in parts, whose thinking is not the reply
                    text = "".join(part["text"] for part in text if part["type"] == "text")
                return {"finish_reason": choice.finish_reason, "reply": hide(key, text + "")}
            except Exception as error:
                problem = f"{error!r} {error.__cause__ or ''}"
                if answer := getattr(error, "response", None):
                    problem = f"status {answer.status_code}, {answer.text}"
                if type(error).__module__.startswith("openai"):  # after the client's own retries
                    break
        problem = " ".join(hide(key, problem).split())[:300]
        raise ConnectionError(f"The judge gave no chat completion: {problem}. The same command resumes.")

    return reply
