"""What is in an adapter's or a run's folder, on one screen."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowrank.adapters import method_of
from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.recipes.parts.show import open_console
from lowrank.training.callbacks.metrics_file import FILE as METRICS
from lowrank.training.callbacks.metrics_file import read_metrics
from lowrank.weights.adapter_info import AdapterSummary, summarise

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_info(path: str | Path, console: Console | None = None) -> AdapterSummary | None:
    """Prints method, base, ranks, modules, sizes, norms of ΔW per layer, and the training's figures.

    Args:
        path: An adapter's folder or file, or a run's folder.
        console: Where to print; standard output by default.

    Returns:
        The summary; None for a run that trained a whole model.

    Raises:
        InputError: There is neither an adapter nor a run.
    """
    path = expanded(path)
    console, folder = console or open_console(), Path(path)
    metrics = folder / METRICS
    if metrics.is_file() and not (folder / "adapter_config.json").exists():
        console.print(f"{folder}: a run without an adapter (a whole model was trained)")
        _show_training(console, metrics)
        return None
    summary = summarise(path)
    console.print(_facts(summary))
    if summary.layers and any(summary.layers.values()):
        console.print(_plot(summary))
    if metrics.is_file():
        _show_training(console, metrics)
    return summary


def _facts(summary: AdapterSummary) -> Table:
    table = Table(box=None, show_header=False, title=str(summary.path), title_justify="left", title_style="bold")
    config = summary.config
    rows = {
        "method": f"{config.method_name}, {method_of(config).headline(config)}",
        "base": summary.base or "not named",
        "of": "" if summary.fingerprint is None else ", ".join(_sizes(summary)),
        "quantised": (summary.quantization or {}).get("quant_method", ""),
        "ranks": ", ".join(f"{rank} ({count} modules)" for rank, count in summary.ranks.items()),
        "modules": ", ".join(f"{count} × {name}" for name, count in summary.modules.items()),
        "whole": f"{len(summary.whole)} tensors: {', '.join(summary.whole[:4])}" if summary.whole else "",
        "parameters": f"{summary.parameters:,}",
        "size": f"{summary.size / 2**20:.1f} MiB",
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _sizes(summary: AdapterSummary) -> list[str]:
    assert summary.fingerprint is not None
    known = {name: value for name, value in summary.fingerprint.to_json().items() if value is not None}
    return [str(known.pop("model_type")), *(f"{name} {value}" for name, value in known.items())]


def _plot(summary: AdapterSummary) -> Table:
    table = Table(box=None, title="‖ΔW‖ per layer", title_justify="left", title_style="bold", show_header=False)
    largest = max(summary.layers.values())
    for number, size in summary.layers.items():
        table.add_row("others" if number is None else str(number), _bar(size / largest), f"{size:.3g}")
    return table


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _show_training(console: Console, path: Path) -> None:
    try:
        lines = read_metrics(path)
    except ValueError as error:
        raise InputError("the run's figures cannot be read: a line is not JSON", where=str(path)) from error
    steps = [line for line in lines if line.get("kind") == "step"]
    evals = [line for line in lines if line.get("kind") == "eval"]
    if steps:
        first, last = steps[0], steps[-1]
        console.print(f"trained {last.get('step')} steps: loss {first.get('loss', 0):.4f} → {last.get('loss', 0):.4f}")
    for line in evals[:1] + evals[-1:] if len(evals) > 1 else evals:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float))
        console.print(f"evaluated at step {line.get('step')}: {figures}")
