"""A room's names are loaded on their first use, and nothing heavy before."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.lazily import imported_for_types

ROOMS = ["adapters", "attention", "data", "training", "weights"]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow")


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_is_there_and_no_module_of_the_room_takes_its_place(room):
    package = importlib.import_module(f"lowrank.{room}")
    assert len(package.__all__) > 3
    assert set(package.__all__).isdisjoint(module.name for module in pkgutil.iter_modules(package.__path__))
    for name in package.__all__:
        assert getattr(package, name) is getattr(package, name)
    with pytest.raises(AttributeError, match=f"'lowrank.{room}' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_listed_is_what_type_checkers_see(room):
    package = importlib.import_module(f"lowrank.{room}")
    told = imported_for_types(Path(package.__file__).read_text(encoding="utf-8"))
    assert sorted(name for _, names in told for name in names) == sorted(package.__all__)


def test_rooms_and_a_config_with_a_mistake_load_nothing_heavy(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {optim: adamw_torc}\n", encoding="utf-8")
    code = (
        "import sys; from importlib import import_module\n"
        f"for room in {ROOMS}: import_module(f'lowrank.{{room}}')\n"
        "from lowrank.config import ConfigError, load_config\n"
        f"try: load_config({str(path)!r})\n"
        "except ConfigError as error: told = str(error)\n"
        "assert 'did you mean adamw_torch?' in told, told\n"
        f"raise SystemExit(', '.join(set({HEAVY}).intersection(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
