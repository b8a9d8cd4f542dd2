"""A LoRA from the difference of two checkpoints, and how much of it the LoRA keeps."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import Progress

from lowrank.errors import InputError
from lowrank.ops.dtypes import Dtype
from lowrank.paths import expanded
from lowrank.weights import ExtractReport, extract


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    r: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> ExtractReport:
    """Extracts with a progress bar, and prints rank and kept energy of every module."""
    if dtype not in get_args(Dtype):
        raise InputError(f"the dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("extracting", total=None)
        report = extract(
            expanded(base),
            expanded(tuned),
            r,
            out=expanded(out),
            energy=energy,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for path, rank in report.ranks.items():
        print(f"{path}: rank {rank}, {report.kept[path]:.2%} of the difference kept")
    if report.whole:
        print(f"saved whole: {', '.join(report.whole)}")
    print(f"proved: loaded again, it changes all {report.proved} tensors that differ, each as far as its rank goes")
    print(f"into {report.out}: {report.kept_of_all:.2%} of the difference kept, {report.seconds:.1f} s")
    print(f"merge it: lowrank merge {shlex.quote(str(report.out))}")
    return report
