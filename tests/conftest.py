"""Makes `from tiny import ...` work from every test folder, and keeps hubs and a person's cache out of the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
if not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()):  # no card: Triton is told before it is imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have their parent's
    os.environ["LOWRANK_CACHE"] = tempfile.mkdtemp(prefix="lowrank-tests-")
    atexit.register(shutil.rmtree, os.environ["LOWRANK_CACHE"], ignore_errors=True)

settings.register_profile("ci", derandomize=True)  # what is red there is red here; new cases are looked for elsewhere
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-losses", action="store_true", help="write tests/invariants/loss_curve.json anew")
    parser.addoption("--keep-configs", action="store_true", help="write tests/recipes/init/*.yaml anew")
