"""Makes `from tiny import ...` work from every test folder, and keeps hubs out of the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-losses", action="store_true", help="write tests/invariants/loss_curve.json anew")
