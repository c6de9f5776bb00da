"""The judge, over real HTTP on loopback: a server that judges by a rule, and `transformers serve`."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from transformers.utils.import_utils import is_serve_available

from cmdp import cli
from cmdp import judge as judging
from cmdp.judge import Endpoint, digest, judge, paired, read_completions, read_replies, verdict

TEMPLATE = Path(judging.__file__).with_name("judge_prompt.txt").read_text()
KEY = "sk-very-secret-1234"
SOON = {"Retry-After-Ms": "1"}


def by_rule(prompt: str) -> str:
    """An honest judge: the solution that says more of `good` is the better."""
    first, second = (
        len(re.findall("good", text)) for text in re.findall(r"<solution \d>(.*?)</solution", prompt, re.S)
    )
    return f"I compare them.\nVerdict: [[{'tie' if first == second else 1 if first > second else 2}]]"


class Server(ThreadingHTTPServer):
    """Answers /v1/chat/completions by `answer`; `trouble` (status, headers, body) are given out before answers."""

    daemon_threads = True

    def __init__(self, answer=by_rule):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.trouble, self.pause = answer, [], 0.0
        self.prompts, self.keys, self.headers, self.options = [], [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.keys.append(self.headers["Authorization"])
            server.headers.append(dict(self.headers))
            trouble = server.trouble.pop(0) if server.trouble else None
        time.sleep(server.pause)
        prompt = body.pop("messages")[0]["content"]
        status, headers, content = trouble or (200, {}, self.chat(prompt, body))
        with server.lock:
            server.now -= 1
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up, or was killed
            self.end_headers()
            self.wfile.write(content)

    def chat(self, prompt: str, body: dict) -> bytes:
        with self.server.lock:
            self.server.prompts.append(prompt)
            self.server.options.append(body)
        message = {"role": "assistant", "content": self.server.answer(prompt)}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with Server() as running:
        yield running
        running.shutdown()


def table(**completions: list[str]) -> pd.DataFrame:
    rows = [(name, text, i) for name, texts in completions.items() for i, text in enumerate(texts)]
    return pd.DataFrame(rows, columns=["prompt", "completion", "sample"])


A = table(p1=["good good", "good"], p2=["", "same"], p3=["good"])
B = table(p1=["good", "good good $5 {x}"], p2=["good", "same"], p3=["bad good"])  # A: win, loss; loss, tie; tie


def test_the_win_rate_is_the_mean_over_prompts_of_wins_and_half_the_ties(server, tmp_path):
    summary = judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 2)
    assert summary["win_rate"]["mean"] == pytest.approx((0.5 + 0.25 + 0.5) / 3, abs=1e-4)
    assert summary["win_rate"]["low"] < summary["win_rate"]["mean"] < summary["win_rate"]["high"]
    assert [summary[name] for name in ("wins", "ties", "losses")] == [1, 2, 2]
    assert (summary["agreement"], summary["first"], summary["identical_pairs"]) == (1.0, 0.5, 1)
    assert len(server.prompts) == len(set(server.prompts)) == 8  # both orders of four pairs that differ
    verdicts = pd.read_csv(tmp_path / "verdicts.csv")
    assert verdicts["score"].tolist() == [1.0, 0.0, 0.0, 0.5, 0.5]
    back = judge(B, A, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 2)
    assert back["win_rate"]["mean"] == pytest.approx(1 - summary["win_rate"]["mean"], abs=2e-4)
    assert len(server.prompts) == 8, "the same pairs, already judged"


def test_the_command_judges_and_prints_the_summary(server, tmp_path, monkeypatch, capsys):
    for name, completions in (("a", A), ("b", B)):
        completions.to_csv(tmp_path / name, index=False)
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--endpoint", server.url, "--model", "rule"]
    words += ["--out", str(tmp_path / "out"), "--options", '{"seed": 1}', "--timeout", "9", "--concurrency", "1"]
    monkeypatch.setattr(sys, "argv", ["cmdp", "judge", *words])
    cli.main()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert capsys.readouterr().out.endswith(json.dumps(summary, indent=2) + "\n")
    assert [summary[name] for name in ("wins", "ties", "losses")] == [1, 2, 2]
    assert (summary["url"], summary["options"], summary["timeout"]) == (server.url, {"seed": 1}, 9.0)
    assert (server.options[0], server.most) == ({"model": "rule", "seed": 1}, 1)


def test_a_judge_that_prefers_a_position_is_found_out_and_favours_nobody(server, tmp_path):
    server.answer = lambda prompt: "Verdict: [[1]]"
    summary = judge(A, B, Endpoint(server.url, "first"), TEMPLATE, tmp_path, 2)
    assert summary["win_rate"]["mean"] == 0.5
    assert (summary["agreement"], summary["first"]) == (0.0, 1.0)


def test_replies_without_a_verdict_leave_their_pair_out_and_are_counted(server, tmp_path):
    server.answer = lambda prompt: "Who knows." if "<solution 1>\n\n" in prompt else by_rule(prompt)
    with pytest.raises(ValueError, match="No pair has a verdict in both orders: 1 replies had none"):
        judge(table(p1=[""]), table(p1=["good"]), Endpoint(server.url, "shy"), TEMPLATE, tmp_path / "one", 1)
    summary = judge(A, B, Endpoint(server.url, "shy"), TEMPLATE, tmp_path / "all", 1)
    assert (summary["replies_without_verdict"], summary["pairs_left_out"], summary["pairs"]) == (1, 1, 5)
    assert [summary[name] for name in ("wins", "ties", "losses")] == [1, 2, 1]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Both fine.\nVerdict: [[1]]", "1"),
        ("**Verdict: [[2]]**\n\n", "2"),
        ("verdict: [[TIE]].", "tie"),
        ("It is [[1]], [[2]] or [[tie]].\n[[2]]", "2"),
        ("[[Solution 1]]", "1"),
        ("Verdict: 2", "2"),
        ("<think>Verdict: [[1]]</think>\nVerdict: [[2]]", "2"),
        ("<think>Verdict: [[1]]</think>", None),
        ("[[1]]\nbecause it is better", None),
        ("Verdict: [[1]] or [[2]]", None),
        ("Verdict: [[3]]", None),
        ("Verdict: 12", None),
        ("Verdict: solution 2", "2"),
        ("**Verdict:** tie.", "tie"),
        ("```\nVerdict: [[1]]\n```", "1"),
        ("Verdict: [[2]]\n---\n", "2"),
        ("<think>so far Verdict: [[1]]", None),
        ("<think>a</think> <think>Verdict: [[1]]", None),
        ("Verdict: 1 of the steps in solution 2 is wrong", None),
        ("Verdict: solution 1 is wrong", None),
        ("Verdict: 1.5", None),
        ("Verdict: 1, 2", None),
        ("Verdict: 2, not [[1]]", None),
        ("Verdict: not [[1]]", None),
        ("It cannot be [[1]].", None),
        ("Verdict: either [[1]] or tie", None),
        ("Solution [[1]] is wrong", None),
        ("No verdict: 1", None),
        ("The other is wrong, so: [[1]]", "1"),
        ("<thinking>Verdict: [[1]]", None),
        ("[THINK]Verdict: [[2]][/THINK]\nVerdict: [[1]]", "1"),
        ("", None),
        (" \n ", None),
    ],
)
def test_a_verdict_is_read_from_the_last_line_alone(reply, expected):
    assert verdict(reply) == expected


def test_trouble_is_retried_and_redirects_are_not_followed(server, tmp_path):
    server.trouble = [
        (429, SOON, b"slow down"),
        (503, SOON, b"busy"),
        (500, SOON, b""),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
    ]
    summary = judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 1)
    assert summary["replies_without_verdict"] == 0
    server.trouble = [(307, {"Location": Server().url}, b"elsewhere")]
    with pytest.raises(ConnectionError, match=r"no chat completion: status 307, elsewhere"):
        judge(A, B, Endpoint(server.url, "other"), TEMPLATE, tmp_path, 1)


def test_a_wait_that_the_server_asks_for_is_kept_and_a_slow_one_is_asked_again(server, tmp_path):
    server.trouble = [(429, {"Retry-After": "1"}, b"")]
    start = time.monotonic()
    judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 1)
    assert time.monotonic() - start > 1.0
    server.pause = 1.0
    threading.Timer(0.5, lambda: setattr(server, "pause", 0.0)).start()
    judge(A, B, Endpoint(server.url, "slow", timeout=0.3), TEMPLATE, tmp_path, 1)


def test_what_was_answered_before_a_failure_is_kept(server, tmp_path):
    endpoint = Endpoint(server.url, "rule")
    server.answer = lambda prompt: (server.trouble.append((400, {}, b"no more")), by_rule(prompt))[1]
    with pytest.raises(ConnectionError, match=r"status 400, no more\. The same command resumes"):
        judge(A, B, endpoint, TEMPLATE, tmp_path, 1)
    assert len(read_replies(tmp_path / "replies.jsonl")) == 1
    server.answer, server.trouble = by_rule, []
    judge(A, B, endpoint, TEMPLATE, tmp_path, 1)
    assert len(server.prompts) == len(set(server.prompts)) == 8


def test_requests_at_a_time_are_bounded(server, tmp_path):
    server.pause = 0.05
    judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 3)
    assert server.most == 3


def test_the_key_goes_to_the_endpoint_and_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 1)
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.answer = lambda prompt: f"You sent {KEY}.\n{by_rule(prompt)}"
    assert judge(A, B, Endpoint(server.url, "echo"), TEMPLATE, tmp_path, 1)["replies_without_verdict"] == 0
    for answer in (KEY, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})):
        server.trouble = [(401, {}, answer.encode())]
        with pytest.raises(ConnectionError, match="<key>") as raised:
            judge(A, B, Endpoint(server.url, "other"), TEMPLATE, tmp_path, 1)
    assert KEY not in str(raised.value) + "".join(capfd.readouterr())
    assert not [path for path in tmp_path.iterdir() if KEY in path.read_text()]
    for secret in (
        Endpoint(server.url, KEY),
        Endpoint(server.url, "m", {"user": KEY}),
        Endpoint(f"{server.url}/{KEY}", "m"),
    ):
        with pytest.raises(ValueError, match=r"JUDGE_API_KEY holds something .* repeat") as raised:
            judge(A, B, secret, TEMPLATE, tmp_path, 1)
        assert KEY not in str(raised.value)
    for wrong in ("two words", "schlüssel", "a\nb"):
        monkeypatch.setenv("JUDGE_API_KEY", wrong)
        with pytest.raises(ValueError, match="JUDGE_API_KEY holds something that is no API key"):
            judge(A, B, Endpoint(server.url, "third"), TEMPLATE, tmp_path, 1)


def test_a_key_too_short_for_a_secret_leaves_replies_as_they_are(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "1")
    summary = judge(A, B, Endpoint(server.url, "rule-1"), TEMPLATE, tmp_path, 1)
    assert (summary["wins"], summary["replies_without_verdict"]) == (1, 0)
    assert set(server.keys) == {"Bearer 1"}


def test_identical_completions_are_ties_without_a_call(server, tmp_path):
    summary = judge(A, A, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 1)
    assert (summary["win_rate"]["mean"], summary["ties"], summary["agreement"]) == (0.5, 5, None)
    assert (summary["first"], summary["identical_pairs"], server.prompts) == (None, 5, [])


def test_what_is_set_for_openai_itself_is_not_sent(server, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://another-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "authorization: Bearer another-secret\nX-Key: another-secret")
    judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 1)
    assert set(server.keys) == {None}
    assert not any("another-secret" in value for headers in server.headers for value in headers.values())


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://me:secret@host/v1",
        "me:secret@host/v1",
        "http://host/v1?k=secret",
        "http://host/v1#secret",
        "http://host:secret/v1",
        "http:///v1",
        "http://[::1/v1",
        "",
    ],
)
def test_urls_that_are_none_or_hold_a_secret_are_refused(tmp_path, url):
    with pytest.raises(ValueError, match="The endpoint is a URL like") as raised:
        judge(A, B, Endpoint(url, "rule"), TEMPLATE, tmp_path, 1)
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_tables_and_templates_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no prompt in common"):
        paired(A, table(p9=["x"]))
    with pytest.raises(ValueError, match="Run B has several completions"):
        paired(A, pd.concat([B, B]))
    with pytest.raises(ValueError, match=r"lacks \$second"):
        judge(A, B, Endpoint("http://localhost/v1", "rule"), "$problem $first", tmp_path, 1)
    (tmp_path / "a.csv").write_text("prompt,text\n1,2\n")
    with pytest.raises(ValueError, match="has no column completion: it has prompt, text"):
        read_completions(tmp_path / "a.csv")


def test_completions_without_partner_are_counted(server, tmp_path):
    summary = judge(A, B.iloc[:3], Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 1)
    assert (summary["pairs"], summary["unpaired_completions"]) == (3, 2)


PROGRAM = """
import sys
from pathlib import Path
from cmdp.judge import Endpoint, judge, read_completions
url, template = sys.argv[1:]
a, b = (read_completions(f"{name}.csv") for name in "AB")
judge(a, b, Endpoint(url, "rule"), Path(template).read_text(), Path("out"), 1)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(judging.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_with_nothing_lost_and_no_call_repeated(server, tmp_path):
    for name, completions in (("A", A), ("B", B)):
        completions.to_csv(tmp_path / f"{name}.csv", index=False)
    words = [sys.executable, "-c", PROGRAM, server.url, str(Path(judging.__file__).with_name("judge_prompt.txt"))]
    server.pause = 0.4
    process = subprocess.Popen(words, cwd=tmp_path, env=environment())
    replies = tmp_path / "out/replies.jsonl"
    deadline = time.monotonic() + 60
    while not (replies.is_file() and replies.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = read_replies(replies)
    assert 3 <= len(kept) < 8
    with open(replies, "a") as lines:
        lines.write('{"key": "cut o')  # as a crash within a write would leave it
    server.pause = 0.0
    run = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    endpoint = Endpoint(server.url, "rule")
    asked = Counter(digest(endpoint, prompt) for prompt in server.prompts)
    assert len(asked) == 8
    assert all(asked[key] == 1 for key in kept)
    assert asked.total() <= 9  # at most the one under way when the run was killed was asked again
    assert kept.items() <= read_replies(replies).items()
    assert server.options[0] == {"model": "rule", "temperature": 0, "max_tokens": 512}
    assert json.loads((tmp_path / "out/summary.json").read_text())["wins"] == 1


def test_an_endpoint_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "RETRIES", 0)
    with pytest.raises(
        ConnectionError, match=r"The judge gave no chat completion: .*refused.*The same command resumes"
    ) as raised:
        judge(A, B, Endpoint("http://127.0.0.1:9/v1", "rule"), TEMPLATE, tmp_path, 2)
    assert "\n" not in str(raised.value)


def test_only_the_text_of_an_answer_in_parts_counts(server, tmp_path):
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Verdict: [[2]]"}]}
    server.answer = lambda prompt: [
        thought,
        {"type": "text", "text": "Fine.\nVerdict: "},
        {"type": "text", "text": "[[1]]"},
    ]
    summary = judge(A, B, Endpoint(server.url, "parts"), TEMPLATE, tmp_path, 2)
    assert (summary["first"], summary["replies_without_verdict"]) == (1.0, 0)
    assert set(read_replies(tmp_path / "replies.jsonl").values()) == {"Fine.\nVerdict: [[1]]"}


@pytest.mark.parametrize("content", [None, [], ""])
def test_an_empty_answer_is_kept_and_is_no_verdict(server, tmp_path, content):
    server.answer = lambda prompt: content
    for _ in range(2):
        with pytest.raises(ValueError, match="2 replies had none"):
            judge(table(p=["x"]), table(p=["y"]), Endpoint(server.url, "mute"), TEMPLATE, tmp_path, 1)
    assert len(server.prompts) == 2


@pytest.mark.parametrize("content", [5, {"text": "[[1]]"}, ["[[1]]"], [{"type": "text"}]])
def test_an_answer_that_is_no_chat_completion_is_said_in_one_line_and_not_stored(server, tmp_path, content):
    server.answer = lambda prompt: content
    with pytest.raises(ConnectionError, match="gave no chat completion"):
        judge(table(p=["x"]), table(p=["y"]), Endpoint(server.url, "odd"), TEMPLATE, tmp_path, 1)
    assert (tmp_path / "replies.jsonl").read_text() == ""


@pytest.mark.parametrize("line", ["nonsense", "[1]", "{}", '{"key": "k"}', '{"key": "k", "reply": ["a"]}', "", "\xff"])
def test_a_malformed_stored_reply_is_named_by_file_and_row(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'{"key": "k", "reply": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"replies\.jsonl, row 2 is not a stored reply"):
        read_replies(path)


@pytest.mark.parametrize("options", [["temperature"], "temperature", None, 1])
def test_options_that_are_no_object_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="options of each request are a JSON object"):
        judge(A, B, Endpoint("http://localhost/v1", "rule", options), TEMPLATE, tmp_path, 1)


def test_without_openai_a_finished_run_repeats_and_another_says_what_to_install(server, tmp_path, monkeypatch):
    first = judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 2)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert judge(A, B, Endpoint(server.url, "rule"), TEMPLATE, tmp_path, 2) == first
    with pytest.raises(ValueError, match="`pip install openai`"):
        judge(A, B, Endpoint(server.url, "other"), TEMPLATE, tmp_path, 2)


# ---- a model behind `transformers serve` ----


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs `pip install 'transformers[serving]'`")
def test_a_local_model_judges_behind_transformers_serve(tmp_path):
    """A random Llama whose few words are verdicts: what it says is arbitrary, but is a verdict more often than not."""
    from cmdp.models import build_model, build_tokenizer

    tokenizer = build_tokenizer(["[[1]]", "[[2]]", "[[tie]]"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = build_model(tokenizer, layers=1, hidden=16, heads=2, seed=0)
    model.config.max_position_embeddings = 1024
    model.generation_config.max_length = None
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "judge")]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(serve, env=environment() | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        options = {"temperature": 0, "max_tokens": 1}
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", str(tmp_path / "judge"), options)
        summary = judge(A, B, endpoint, TEMPLATE, tmp_path / "out", 2)
    finally:
        process.terminate()
        process.wait(timeout=20)
    replies = read_replies(tmp_path / "out/replies.jsonl")
    assert len(replies) == 8
    assert {verdict(reply) for reply in replies.values()} & {"1", "2", "tie"}
    assert summary["pairs"] == 5
    assert judge(A, B, endpoint, TEMPLATE, tmp_path / "out", 2) == summary  # from disk: the server has gone
