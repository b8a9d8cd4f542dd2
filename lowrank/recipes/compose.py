"""Several adapters into one, or one to a lower rank, and how near the result is."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lowrank.paths import expanded
from lowrank.weights import ComposeReport, compose, resize
from lowrank.weights.arithmetic.compose_methods import ComposeMethod, MajoritySign


def compose_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: ComposeMethod = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    seed: int = 0,
) -> ComposeReport:
    """Composes and prints ranks and the distance from the plain weighted sum."""
    report = compose(
        [expanded(adapter) for adapter in adapters],
        out=expanded(out),
        weights=weights,
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
    )
    _show(report)
    return report


def resize_adapter(
    adapter: str | Path, out: str | Path, *, rank: int | None = None, energy: float | None = None
) -> ComposeReport:
    """Resizes and prints what that lost; see `lowrank.weights.resize`."""
    report = resize(expanded(adapter), rank, out=expanded(out), energy=energy)
    _show(report)
    return report


def _show(report: ComposeReport) -> None:
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(Counter(report.ranks.values()).items()))
    print(f"{report.method} into {report.out}: ranks {ranks}")
    print(f"distance from the weighted sum of the effects: {report.error:.2%}")
    for path, error in sorted(report.errors.items(), key=lambda item: -item[1])[:5]:
        if error > 0.01:
            print(f"  {path}: {error:.2%}")
    for note in report.notes:
        print(note)
    print(f"merge it: lowrank merge {shlex.quote(str(report.out))}")
