"""Makes `from tiny import ...` work from every test folder, and keeps hubs out of the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("ci", derandomize=True)  # what is red there is red here; new cases are looked for elsewhere
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-losses", action="store_true", help="write tests/invariants/loss_curve.json anew")
    parser.addoption("--keep-configs", action="store_true", help="write tests/recipes/init/*.yaml anew")
