"""The commands: what they print and write, and the one line they end in when something is wrong."""

import logging
import os
import signal
import subprocess
import sys

import pytest

from cmdp import cli


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMDP_TRACEBACK", "")


def command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cmdp", *words])
    cli.main()


def test_help_lists_the_commands_without_loading_torch():
    code = "import sys; sys.argv = ['cmdp', '--help']; import cmdp.cli\n"
    code += "try: cmdp.cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("train", "memory", "prune", "export", "judge"):
        assert f"\n    {name}" in done.stdout


def test_the_module_runs_as_the_command():
    """As `accelerate launch -m cmdp.cli` does."""
    done = subprocess.run([sys.executable, "-m", "cmdp.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: cmdp")


def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt("stopped at step 3")

    monkeypatch.setattr("cmdp.models.prune", stop)
    with pytest.raises(SystemExit) as raised:
        command(monkeypatch, "prune", "model", "out", "--without", "1")
    assert raised.value.code == 130
    assert capsys.readouterr().err == "cmdp prune: stopped at step 3\n"


def test_sigterm_outside_training_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr("cmdp.models.prune", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised:
        command(monkeypatch, "prune", "model", "out", "--without", "1")
    assert raised.value.code == 130
    assert capsys.readouterr().err == "cmdp prune: stopped: the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_librarys_note_on_a_kernel_of_the_hub_is_not_shown(monkeypatch, caplog):
    own = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def noted(*_):
        own.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no network")
        own.warning("another note")
        return 2, 1

    monkeypatch.setattr("cmdp.models.prune", noted)
    command(monkeypatch, "prune", "model", "out", "--without", "1")
    assert [record.getMessage() for record in caplog.records] == ["another note"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "nowhere", "out"), "nowhere"),
        (("judge", "a.csv", "b.csv", "--endpoint", "http://x/v1", "--model", "m", "--out", "o"), r"a\.csv"),
        (
            ("judge", "a", "b", "--endpoint", "http://x/v1", "--model", "m", "--out", "o", "--options", "[1"),
            "--options takes a JSON object",
        ),
        (("prune", "nowhere", "out", "--without", "1"), "There is no local folder nowhere"),
        (("memory", "--config", "none.yaml"), r"There is no none\.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(monkeypatch, words, message):
    with pytest.raises(SystemExit, match=message) as raised:
        command(monkeypatch, *words)
    assert "\n" not in str(raised.value)
