"""The repository agrees with itself: rooms, environments, profiles, chosen settings, generated tables."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmdp.methods import METHODS, START, TRL, check_method
from replication import experiments
from replication.cli import STAGES

ROOT = Path(__file__).parents[1]
MODULES = [path.relative_to(ROOT) for room in ("cmdp", "replication") for path in sorted((ROOT / room).rglob("*.py"))]
LINES = {"cmdp": 3000, "replication": 2700}  # of code


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


# ---- two rooms ----


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "cmdp"], ids=str)
def test_the_library_knows_neither_the_replication_nor_its_tools(path):
    drawing = set() if path.name == "ceiling.py" else {"matplotlib"}  # its figure, where there is matplotlib
    assert not packages(path) & {"replication", "dvc", "papermill", "seaborn", "scipy", *drawing}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("cmdp/reward.py", {"math", "typing", "torch", "dataclasses"}),
        ("cmdp/divergence.py", {"functools", "math", "typing", "torch", "trl", "peft"}),
    ],
)
def test_the_method_rests_on_torch_and_kernels_alone(module, allowed):
    assert packages(Path(module)) <= allowed


def test_tasks_know_no_trainer():
    for path in MODULES:
        if path.parts[:2] == ("cmdp", "tasks"):
            assert not {"torch", "trl", "cmdp.trainer", "cmdp.train"} & (imports(path) | packages(path)), path


@pytest.mark.parametrize(
    "name", ["experiments", "tables", "claims", "plots", "readme", "theory.plots", "theory.tables"]
)
def test_results_are_read_without_torch(name):
    code = f"import sys, replication.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_the_library_is_light():
    code = "import sys, cmdp; sys.exit(bool({'torch', 'transformers', 'trl', 'dvc', 'seaborn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def lines_of_code(path: Path) -> int:
    """Lines of a file without blank ones, comments and docstrings."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            found -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(found)


@pytest.mark.parametrize("room", LINES)
def test_each_room_is_compact(room):
    assert sum(lines_of_code(path) for path in MODULES if path.parts[0] == room) <= LINES[room]


def test_lock_and_readme_are_short():
    assert len((ROOT / "dvc.lock").read_text().splitlines()) <= 5000
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1800


def test_only_the_library_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["cmdp", "cmdp.*"]
    needed = {canonicalize_name(Requirement(need).name) for need in project["project"]["dependencies"]}
    assert not needed & {"dvc", "papermill", "seaborn", "matplotlib", "jupyterlab", "scipy"}


# ---- dependencies ----


def declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {name: group for name, group in project["optional-dependencies"].items() if name != "track"}
    return [
        *project["dependencies"],
        *(need for group in groups.values() for need in group),
    ]  # no result needs a tracker


def test_environment_yml_asks_for_the_packages_and_ranges_of_pyproject():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert sorted(need for need in pip if not need.startswith("-")) == sorted(declared())


def test_requirements_lock_pins_every_declared_package_within_its_range():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}
    for need in map(Requirement, declared()):
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), need
    assert not [name for name in pins if name.startswith("nvidia")]


def test_every_dependency_of_the_library_is_imported_by_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = {name for path in MODULES if path.parts[0] == "cmdp" for name in packages(path)}
    names = {"pyyaml": "yaml", "math-verify": "math_verify", "reasoning-gym": "reasoning_gym"}
    for need in project["dependencies"]:
        name = Requirement(need).name
        if name != "bitsandbytes":  # transformers imports it for 4-bit weights
            assert names.get(name, name) in used, name


# ---- the table of runs ----


def test_every_run_names_a_method_a_start_and_tuned_settings():
    chosen = yaml.safe_load((ROOT / experiments.CHOSEN).read_text())["runs"]
    params = yaml.safe_load((ROOT / experiments.PARAMS).read_text())
    for row in experiments.rows(ROOT / experiments.EXPERIMENTS).values():
        assert check_method(row.method) == row.method
        assert row.tuned in chosen
        assert row.start in params["start"]
        assert re.fullmatch("[a-z0-9][a-z0-9.-]*", row.key)
        assert (ROOT / experiments.START / row.start / "model.safetensors").is_file()


def test_an_unknown_run_method_or_field_is_refused(tmp_path):
    path = tmp_path / "experiments.yaml"
    with pytest.raises(ValueError, match="There is no method 'cmdp-adptive'"):
        check_method("cmdp-adptive")
    path.write_text("runs: {gkd: {method: gkd, seeds: [0]}}")
    with pytest.raises(ValueError, match=r"has no run 'cmdp-adptive'\. It has: gkd"):
        experiments.row("cmdp-adptive", path)
    path.write_text("runs: {gkd: {method: gkd, seeds: [0], sead: 1}}")
    with pytest.raises(ValueError, match=r"run gkd has unknown fields \['sead'\]"):
        experiments.rows(path)
    path.write_text("runs: {gkd: {method: gkd, seeds: [0]}, more: {method: gkd, name: gkd, seeds: [0, 1]}}")
    with pytest.raises(ValueError, match="runs gkd and more both train gkd with seed 0"):
        experiments.rows(path)


def test_no_run_uses_a_seed_of_tuning():
    tuning = yaml.safe_load((ROOT / experiments.EXPERIMENTS).read_text())["tuning"]
    used = {seed for row in experiments.rows(ROOT / experiments.EXPERIMENTS).values() for seed in row.seeds}
    assert not used & set(tuning["seeds"])
    assert {entry["method"] for entry in tuning["entries"].values()} <= set(METHODS)


def test_methods_are_a_table():
    assert not set(METHODS) & {START, *TRL}
    assert all(isinstance(settings, dict) for settings in METHODS.values())


# ---- the pipeline ----


def test_every_training_stage_depends_on_the_whole_library():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name in ("pretrain", "tune", "run"):
        assert {"cmdp", "replication/run.py"} <= set(stages[name].get("do", stages[name])["deps"])


def reached(module: str) -> set[str]:
    """The files of replication, but the command line, that a module of it imports, directly or not."""
    todo, found = [Path("replication") / module], set()
    while todo:
        path = todo.pop()
        if str(path) not in found:
            found.add(str(path))
            names = {name for name in imports(path) if name and name.startswith("replication.")}
            todo += [file for name in names if (ROOT / (file := Path(name.replace(".", "/") + ".py"))).is_file()]
    return found


def test_every_stage_depends_on_the_code_of_replication_that_it_runs():
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        stage = stage.get("do", stage)
        commands = re.findall(r"python -m replication ([\w-]+) ?(\w*)", str(stage["cmd"]))
        for command, argument in commands:
            module = STAGES[command][0].partition(":")[0]
            if module == "theory" or (command, argument) == ("figures", "theory"):
                continue  # theory depends on its whole folder
            needed = reached(f"{module}.py")
            if command == "figures":
                needed = {path for path in needed if "/theory/" not in path}
            assert needed <= set(stage["deps"]), name


def test_the_repository_speaks_of_itself_alone():
    """No path of a machine, and nothing outside the clone."""
    for path in [*MODULES, Path("README.md"), Path("dvc.yaml"), Path("Makefile"), *Path("docs").glob("*.md")]:
        assert not re.search(r"\.\./shared|/work/|/root/", (ROOT / path).read_text(encoding="utf-8")), path
