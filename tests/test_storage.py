"""Outputs appear whole or not at all; a checkpoint serves only the run that made it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmdp import storage


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_folder_appears_whole_and_replaces_the_old_one():
    with storage.whole(Path("models/student")) as folder:
        (folder / "old").touch()
    with storage.whole(Path("models/student")) as folder:
        (folder / "new").touch()
        assert [path.name for path in Path("models/student").iterdir()] == ["old"]
    assert [path.name for path in Path("models/student").iterdir()] == ["new"]
    assert [path.name for path in Path("models").iterdir()] == ["student"]


def test_a_block_that_fails_leaves_the_old_folder():
    with storage.whole(Path("out")) as folder:
        (folder / "old").touch()

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError), storage.whole(Path("out")) as folder:
        fail(folder)
    assert [path.name for path in Path("out").iterdir()] == ["old"]
    assert [path.name for path in Path().iterdir()] == ["out"], "nothing is left behind"


def checkpoint(folder: Path, step: int, certified: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "nested").mkdir(parents=True)
    (path / "nested" / "shard").write_bytes(b"0123")
    (path / "model.safetensors").write_bytes(b"weights")
    if certified:
        storage.certify(path)
    return path


def test_a_run_resumes_from_its_own_checkpoint_only(capsys):
    folder, resume = storage.checkpoint_folder("run", "one")
    assert not resume
    checkpoint(folder, 1)
    assert storage.checkpoint_folder("run", "one") == (folder, True)
    assert storage.checkpoint_folder("run", "another") == (folder, False)
    assert "was made by other settings" in capsys.readouterr().out


def test_a_fingerprint_tells_settings_inputs_and_code_apart(monkeypatch):
    Path("weights").write_bytes(b"1")
    found = {storage.fingerprint({"lam": lam}, [Path("weights")]) for lam in (1.0, 2.0, 1.0)}
    assert len(found) == 2
    Path("weights").write_bytes(b"2")
    found.add(storage.fingerprint({"lam": 1.0}, [Path("weights")]))
    package = Path("package")
    package.mkdir()
    (package / "storage.py").touch()
    monkeypatch.setattr(storage, "__file__", str(package / "storage.py"))
    found.add(storage.fingerprint({"lam": 1.0}, [Path("weights")]))
    assert len(found) == 4


def test_a_checkpoint_cut_off_in_writing_is_dropped_and_the_one_before_serves(capsys):
    folder, _ = storage.checkpoint_folder("run", "one")
    checkpoint(folder, 1)
    checkpoint(folder, 2, certified=False)
    (folder / "checkpoint-3").mkdir()
    assert storage.checkpoint_folder("run", "one") == (folder, True)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert capsys.readouterr().out.count("is not as it was written") == 2


@pytest.mark.parametrize("name", ["model.safetensors", "nested/shard", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path, content: path.unlink(),
        lambda path, content: path.write_bytes(b""),
        lambda path, content: path.write_bytes(content[: len(content) // 2]),
        lambda path, content: path.write_bytes(bytes([content[0] ^ 64]) + content[1:]),
        lambda path, content: path.write_bytes(b"[1]"),
        lambda path, content: path.write_bytes(b'{"trainer_state.json": 1}'),
    ],
    ids=["deleted", "empty", "half", "a bit flipped", "a list", "other content"],
)
def test_a_damaged_checkpoint_is_dropped(name, damage):
    folder, _ = storage.checkpoint_folder("run", "one")
    path = checkpoint(folder, 1) / name
    damage(path, path.read_bytes())
    assert storage.checkpoint_folder("run", "one") == (folder, False)
    assert not list(folder.glob("*checkpoint*"))


def test_a_second_process_is_told_who_holds_a_run():
    code = "from cmdp.storage import locked\nwith locked('toy/cmdp/0'): pass"
    command = [sys.executable, "-c", code]
    with storage.locked("toy/cmdp/0"):
        second = subprocess.run(command, capture_output=True, text=True)
    assert f"toy/cmdp/0 is being trained by process {os.getpid()} on" in second.stderr
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize(("text", "value"), [("2e-5", 2e-5), ("-1E+3", -1e3), ("1.5", 1.5), ("e5", "e5"), ("2e", "2e")])
def test_a_number_without_a_point_is_one(text, value, tmp_path):
    (tmp_path / "params.yaml").write_text(f"train: {{learning_rate: {text}}}")
    assert storage.read_yaml(tmp_path / "params.yaml") == {"train": {"learning_rate": value}}


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [1", "a: {", "!!python/object/apply:os.getcwd []", "a: *b", "\x00"])
def test_what_is_no_mapping_is_said_in_one_line_and_makes_no_objects(text):
    Path("params.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"params\.yaml") as raised:
        storage.read_yaml(Path("params.yaml"))
    assert "\n" not in str(raised.value)


def test_overrides_take_the_place_of_what_a_file_says():
    Path("params.yaml").write_text("a: {b: 1, c: 2}\nd: [1, 2]\n")
    assert storage.read_yaml(Path("params.yaml"), "a.b=3", "d=[4]", "e.f=x") == {
        "a": {"b": 3, "c": 2}, "d": [4], "e": {"f": "x"}
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sft", "cmdp-at-0.5", "4b.it"])
def test_a_name_is_a_part_of_a_path(name):
    storage.check_names(name)


@pytest.mark.parametrize(
    "name", ["sft-/../../victim", "..", ".a", "a/b", "a\\b", "A", "", "a b", "a\n", "a" * 300, "é", None]
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="is no name") as raised:
        storage.check_names("sft", name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["record.json", "table.csv"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b'{"a": '], ids=["missing", "empty", "noise", "half"])
def test_a_damaged_file_is_named_in_one_line(name, content):
    if content == b'{"a": ' and name == "table.csv":
        pytest.skip("a table of one column")
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .") as raised:
        storage.read(Path(name))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_written_is_named_and_the_old_file_stays(monkeypatch):
    storage.write_text("old", Path("out/file"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"out/file cannot be written .*No space left"):
        storage.write_text("new", Path("out/file"))
    assert Path("out/file").read_text() == "old"
    Path("folder").touch()
    with pytest.raises(OSError, match="folder"):
        storage.write_text("new", Path("folder/file"))


def test_an_error_of_a_library_is_one_line_and_an_interrupt_stays_one():
    with pytest.raises(OSError, match=r"^weights cannot be written .*: two lines$"), storage.named("weights"):
        raise Exception("two\nlines")
    with pytest.raises(KeyboardInterrupt), storage.named("weights"):
        raise KeyboardInterrupt
