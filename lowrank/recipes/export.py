"""An adapter for vLLM, llama.cpp, mlx-lm or peft, or as one file."""

from __future__ import annotations

from pathlib import Path

from lowrank.paths import expanded
from lowrank.weights import ExportReport, export
from lowrank.weights.export import Target


def export_adapter(adapter: str | Path, out: str | Path, *, to: Target, base: str | Path | None = None) -> ExportReport:
    """Exports, and prints what was changed and how the other program is called; see `lowrank.weights.export`."""
    report = export(expanded(adapter), expanded(out), to=to, base=base and expanded(base))
    print(f"exported to {report.out}" + ("" if report.rank is None else f", rank {report.rank}"))
    for note in report.notes:
        print(note)
    print(f"use it: {report.command}")
    return report
