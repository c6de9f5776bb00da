"""The commands: what they print and write, and the one line they end in when something is wrong."""

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
