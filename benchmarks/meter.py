"""What the benchmarks measure memory and growth with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def extra_mebibytes(work: Callable[[], object], device: torch.device) -> float:
    """Peak of memory while `work` runs, above what was held before: of a CUDA device, or of this process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what the process holds now
    before = status_bytes("VmRSS")
    work()
    return (status_bytes("VmHWM") - before) / 2**20


def status_bytes(field: str) -> int:
    """A size in /proc/self/status: VmRSS (held now), VmHWM (the most held), VmData (asked for)."""
    return _kibibytes(Path("/proc/self/status"), field) * 1024


def available_bytes() -> int:
    """What the machine could give before it runs out."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def _kibibytes(file: Path, field: str) -> int:
    return int(next(line for line in file.read_text().splitlines() if line.startswith(f"{field}:")).split()[1])


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(length) by least squares; NaN with fewer than two."""
    if len(lengths) < 2:
        return math.nan
    x, y = [math.log(length) for length in lengths], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def machine(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {torch.get_num_threads()} threads"
