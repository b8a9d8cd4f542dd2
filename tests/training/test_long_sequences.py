"""A long sequence trains in memory that grows with its length, not with its square."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "long_context.py"
SMALL = ["--hidden", "64", "--layers", "2", "--vocabulary", "32000", "--dtype", "float32"]


def step(backend: str, length: int) -> dict[str, float]:
    command = [sys.executable, str(BENCHMARK), *SMALL, "--one", f"{backend}:{length}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("backend", ["segments", "sdpa"])
def test_from_two_to_eight_thousand_tokens(backend):
    """The scores of 8k x 8k would be 256 MiB a head, the logits of 8k x 32,000 1 GiB.
    Four times the length is four times the memory, less what does not grow."""
    short, long = step(backend, 2048), step(backend, 8192)
    assert long["mebibytes"] <= 4.4 * short["mebibytes"]
    assert long["mebibytes"] < 240
    assert abs(long["loss"] - 10.4) < 0.1  # ln 32,000: nothing is learnt yet, and all of it was computed
