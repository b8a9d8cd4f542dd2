"""That the kernels compile for cards, which Triton does without one: the interpreter takes more than the compiler."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compiled_kernels.py")


@pytest.mark.parametrize(
    "capability", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_every_kernel_becomes_machine_code(capability, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {int(arch) for _, arch, _ in lines} == {capability}
    assert all(int(size) > 1000 for *_, size in lines)
    assert collections.Counter(name for name, *_ in lines) == {
        "_norm": 4, "_norm_slopes": 4, "_gate": 3, "_gate_slopes": 3, "_rotate": 6, "_loss": 6
    }  # fmt: skip
