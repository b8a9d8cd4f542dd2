"""What a run prints: its plan before any work, and what came of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from lowrank.adapters import describe, method_of
from lowrank.config import RunConfig
from lowrank.data.batches.order import Batches
from lowrank.ops.kernels.on_card import kernels_on
from lowrank.quantisers.registry import parameter_count
from lowrank.recipes.parts.optimisation import remarks
from lowrank.recipes.parts.setup import Setup
from lowrank.recipes.parts.sharing import drawing
from lowrank.recipes.parts.streams import unfailing
from lowrank.training.callbacks.run_report import comparison
from lowrank.training.evaluation.evaluation import Evaluation

SAMPLES = 3
FILE_WIDTH = 120


def open_console(quiet: bool = False) -> Console:
    """As wide as the terminal; in a log nothing is cut at 80 columns. Brackets and colons in a text are what
    they are. A quiet one shows nothing."""
    console = Console(file=unfailing(sys.stdout), quiet=quiet, markup=False, emoji=False)  # a path is no markup
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def show_line(console: Console, text: str) -> None:
    """Prints a line as it is: not wrapped, nothing in it coloured."""
    console.print(text, highlight=False, soft_wrap=True)


def plan_of(config: RunConfig, setup: Setup, adapter: str = "default") -> dict[str, str]:
    """What the run of an adapter will do, line by line."""
    model, plan, length = setup.model, setup.plan, setup.length
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = parameter_count(model) - sum(info.parameters for info in describe(model).values())
    section = config.quantization
    held = "" if section is None else f", base in {section.width} bits by {section.quant_method}"
    training = config.training
    epoch = "" if length.per_epoch is None else f" ({length.per_epoch:,} an epoch)"
    contradicted = remarks(training, length.steps)
    return {
        "model": f"{config.model.name_or_path} ({type(model).__name__}, {base / 1e6:,.1f} M parameters)",
        "dtype": f"{str(model.dtype).removeprefix('torch.')}{held}, on {model.device}",
        "products": str(setup.products),
        **({} if setup.crowded is None else {"machine": setup.crowded}),
        **({} if setup.offloaded is None else {"offload": str(setup.offloaded)}),
        "attention": f"{setup.attention.backend}: {setup.attention.why}",
        **_kernels(model.device),
        "loss": setup.loss.why,
        "adapter": _adapter(config.adapter.method, model, adapter),
        "trainable": f"{trainable:,} parameters, {trainable / base:.3%} of the base's",
        "data": plan.origin,
        **setup.asking,
        "batches": f"{_batches(plan, drawing(config.adapter, training))}; {setup.size}",
        "steps": f"{length.steps:,}{epoch}, learning rate {training.learning_rate:g}, {training.lr_scheduler_type}",
        "output": training.output_dir,
        **_left_out(plan),
        **({"warning": "\n".join(contradicted)} if contradicted else {}),
    }


def _kernels(device: torch.device) -> dict[str, str]:
    """Of a card."""
    if device.type != "cuda":
        return {}
    return {"kernels": str(kernels_on(device))}


def rows_of(plan: Batches) -> str:
    """What was read, in numbers: rows, tokens, and what was left out; of a stream, so far."""
    return f"streamed: {plan.counts}" if plan.examples is None else str(plan.counts)


def _left_out(plan: Batches) -> dict[str, str]:
    return {"left out": "\n".join(plan.reasons)} if plan.reasons else {}


def _batches(plan: Batches, drawn: str | None) -> str:
    fill = plan.fill()
    if not plan.packing:
        return f"{plan.batch_size} rows a batch" + ("" if fill is None else f", padding {1 - fill:.1%}")
    packs = f"packs of up to {plan.max_tokens} tokens"
    if plan.shares:
        return f"{packs}: {_shared(plan)}" + ("" if drawn is None else f", for which {drawn} draws once")
    told = packs if fill is None else f"{packs}, {fill:.1%} full"
    return told if plan.unshared is None else f"{told}, what examples share computed for each: {plan.unshared}"


def _shared(plan: Batches) -> str:
    """What sharing the beginnings of examples saves; of a stream there is no telling how much."""
    passing = plan.passing()
    if plan.examples is None or passing is None:
        return "what examples begin with in common is computed once"
    tokens = int(plan.examples.lengths.sum())
    return f"{tokens:,} tokens as {passing:,}; {tokens / passing:.2f} times"


def _adapter(method: str, model: Any, adapter: str) -> str:
    info = describe(model).get(adapter)
    if info is None:
        return method
    matched = ", ".join(f"{pattern} {count}" for pattern, count in info.matched.items())
    rank = method_of(info.config).rank(info.config, "")
    told = f"{method}, r = {rank}, on {len(info.modules)} modules ({matched})"
    return told + "".join(f"\n{reason}" for reason in _passed_over(info.left_out))


def _passed_over(reasons: Mapping[str, str]) -> list[str]:
    """What "all-linear" has passed over, each layer's name once for all layers that have it."""
    paths: dict[tuple[str, str], int] = {}
    for path, why in reasons.items():
        name = (".".join(path.rsplit(".", 2)[-2:]), why)
        paths[name] = paths.get(name, 0) + 1
    return [f"{count} times {name} left out: {why}" for (name, why), count in paths.items()]


def show_plan(console: Console, plan: Mapping[str, str]) -> None:
    """Prints it."""
    table = Table.grid(padding=(0, 2))
    for name, text in plan.items():
        table.add_row(name, text)
    console.print(Panel(table, title="this run", title_align="left"), highlight=False)


def show_outcome(console: Console, before: Evaluation | None, after: Evaluation | None) -> None:
    """Before and after side by side, then a few answers of each."""
    table = Table("", "before", "after", title="evaluation", title_justify="left")
    for row in comparison(before, after):
        table.add_row(*row)
    if table.row_count:
        console.print(table, highlight=False)
    first, second = (evaluation.samples if evaluation else () for evaluation in (before, after))
    for i in range(min(SAMPLES, max(len(first), len(second)))):
        console.print(_answers(first[i : i + 1], second[i : i + 1]), highlight=False)


def _answers(before: Any, after: Any) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    shown = (*before, *after)[0]
    table.add_row("asked", (shown.turns[-1][1] if shown.turns else shown.prompt).strip()[-300:], style="dim")
    table.add_row("expected", shown.expected)
    for name, samples in (("before", before), ("after", after)):
        for sample in samples:
            table.add_row(name, sample.answer.strip() or "(nothing)", style="green" if sample.correct else "red")
    table.add_row("")
    return table
