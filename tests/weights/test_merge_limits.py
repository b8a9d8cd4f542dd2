"""A merge's memory, measured on a checkpoint much larger than what it may use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "merge.py"


def merge_within_bounds(folder: Path, *options: str) -> dict:
    """At most 150 MiB over the interpreter plus twice the largest tensor."""
    command = [sys.executable, str(BENCHMARK), *options, "--folder", str(folder), "--repeats", "1", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    [merge] = found["merges"]
    assert merge["extra"] <= 150 * 2**20 + 2 * found["largest"]
    assert merge["lost"] > 0
    return found


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    found = merge_within_bounds(tmp_path, "--gib", "0.4", "--hidden", "1024", "--vocabulary", "8000", "--shard", "0.1")
    assert found["bytes"] > 400 * 2**20


@pytest.mark.slow
def test_four_gibibytes(tmp_path: Path) -> None:
    found = merge_within_bounds(tmp_path)
    assert found["bytes"] > 4 * 2**30
