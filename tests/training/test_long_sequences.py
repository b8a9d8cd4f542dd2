"""A long sequence trains in memory that grows with its length, not with its square."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "long_context.py"
SMALL = ["--hidden", "64", "--layers", "2", "--vocabulary", "32000"]


def peak_mib(length: int) -> float:
    command = [sys.executable, str(BENCHMARK), *SMALL, "--one", str(length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"]


def test_from_four_to_sixteen_thousand_tokens():
    """Scores of 16k x 16k would be 1 GiB a head, logits of 16k x 32,000 2 GiB; four times the length is four times the
    memory, less what does not grow."""
    short, long = peak_mib(4096), peak_mib(16384)
    assert long <= 4.4 * short
    assert long < 700
