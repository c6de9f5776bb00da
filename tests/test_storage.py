"""Outputs appear whole or not at all; a checkpoint serves only the run that made it."""

from pathlib import Path

import pytest
import yaml

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


def checkpoint(folder: Path, step: int, state: str) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)


def test_the_code_that_a_checkpoint_depends_on_is_there():
    package = Path(storage.__file__).parent
    assert all((package / f"{name}.py").is_file() or (package / name).is_dir() for name in storage.MAKERS)


def test_a_run_resumes_from_its_own_checkpoint_only(capsys):
    Path("data").write_text("problems")
    folder, resume = storage.checkpoint_folder("run", {"lam": 1.0}, [Path("data")])
    assert not resume
    checkpoint(folder, 1, "{}")
    assert storage.checkpoint_folder("run", {"lam": 1.0}, [Path("data")]) == (folder, True)
    assert storage.checkpoint_folder("run", {"lam": 2.0}, [Path("data")]) == (folder, False)
    assert "was made by other settings" in capsys.readouterr().out
    checkpoint(folder, 1, "{}")
    Path("data").write_text("other problems")
    assert storage.checkpoint_folder("run", {"lam": 2.0}, [Path("data")]) == (folder, False)


def test_a_checkpoint_cut_off_in_writing_is_dropped_and_the_one_before_serves():
    folder, _ = storage.checkpoint_folder("run", {}, [])
    checkpoint(folder, 1, "{}")
    checkpoint(folder, 2, '{"global_st')
    (folder / "checkpoint-3").mkdir()
    assert storage.checkpoint_folder("run", {}, []) == (folder, True)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_notebook_finds_the_root_from_below_it_and_says_where_there_is_none(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert storage.enter_repository() == tmp_path
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="not inside a clone"):
        storage.enter_repository()


@pytest.mark.parametrize(("text", "value"), [("2e-5", 2e-5), ("-1E+3", -1e3), ("1.5", 1.5), ("e5", "e5"), ("2e", "2e")])
def test_a_number_without_a_point_is_one(text, value, tmp_path):
    (tmp_path / "params.yaml").write_text(f"train: {{learning_rate: {text}}}")
    assert storage.read_yaml(tmp_path / "params.yaml") == {"train": {"learning_rate": value}}


def test_a_parameter_file_makes_no_objects():
    with pytest.raises(yaml.constructor.ConstructorError):
        storage.parse_yaml("!!python/object/apply:os.getcwd []")
