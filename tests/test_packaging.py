"""The packages are ours from any folder, keep to their floors, and hide nobody; the doctor sees when not."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from scripts import doctor

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# Imports go down only. Programs share a floor, so that they never import each other.
PROGRAM_FLOOR = {"condense", "distill_feat", "kd"}
FLOORS = [{"config"}, {"utils"}, {"NCFM"}, {"condenser"}, PROGRAM_FLOOR, {"distilltool"}, {"scripts"}]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PROGRAMS = [name for name in PACKAGES if FLOOR[name] >= FLOOR["condense"]]


def imported(path: Path) -> set[str]:
    """Top-level names that a module imports, anywhere in it."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def test_a_program_of_another_checkout_is_refused(tmp_path: Path) -> None:
    for name in ("kd/train.py", "utils/launch.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "utils").rename(tmp_path / "moved")  # what is imported is of the installed checkout
    words = [sys.executable, str(tmp_path / "kd" / "train.py"), "--help"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    (tmp_path / "moved").rename(tmp_path / "utils")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == (
        f"{words[1]}: it would import from {ROOT}: install this checkout (python -m pip install -e {tmp_path})\n"
    )


def plant_stranger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another `utils`, before ours on the path."""
    stranger = folder / "utils" / "__init__.py"
    stranger.parent.mkdir()
    stranger.touch()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return stranger


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_ours_from_an_empty_folder(package: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", f"import {package}; print({package}.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        upward = {name for name in imported(path) - {package} if FLOOR.get(name, -1) >= FLOOR[package]}
        assert not upward, f"{path} imports {upward}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_module_beside_a_program_hides_another(program: str) -> None:
    """A program that is started by its path puts its own folder first."""
    beside = {path.stem.lower() for path in (ROOT / program).iterdir() if path.suffix in (".py", "")}
    others = {name.lower() for name in {*PACKAGES, *sys.stdlib_module_names, *packages_distributions()}}
    others -= {"distilltool"} if program == "kd" else set()  # both names give the same objects: test_distilltool.py
    assert not (beside - {"__init__", "__pycache__"}) & others


def test_every_package_is_installed_typed_and_examined() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    installed = {name.split(".")[0] for name in tool["setuptools"]["packages"]["find"]["include"]}
    assert installed == set(tool["mypy"]["files"]) == set(doctor.PACKAGES) == set(PACKAGES)


def test_doctor_finds_this_installation_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0, capsys.readouterr().out


def test_doctor_names_the_stranger_and_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = plant_stranger(tmp_path, monkeypatch)
    assert doctor.main() == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1
    assert f"utils: another package hides ours: {stranger}: take its folder off PYTHONPATH" in problems[0]


def test_doctor_reports_versions_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    assert all("0.0.1 is outside" in problem for _, _, problem in doctor.dependencies())


def test_doctor_reports_what_is_missing_or_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.state("no-such-distribution") == ("absent", "not installed")
    (tmp_path / "broken_dependency.py").write_text("raise OSError('libx.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(doctor.MODULES, "numpy", "broken_dependency")
    assert doctor.state("numpy")[1] == "cannot be imported (OSError: libx.so: no such file)"
