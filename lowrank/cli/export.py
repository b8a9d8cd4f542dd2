"""`lowrank export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = (
    "Example: lowrank export runs/quickstart served --to vllm; from mlx-lm: lowrank export adapters for-peft --to peft"
)


class Target(StrEnum):
    """What can be exported to."""

    vllm = "vllm"
    llama_cpp = "llama.cpp"
    mlx = "mlx"
    peft = "peft"
    safetensors = "safetensors"


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder: peft's, or mlx-lm's.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where it goes.")],
    to: Annotated[Target, typer.Option(help="Who will read it.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
) -> None:
    """Write an adapter so that another program reads it, and say how that is called."""
    from lowrank.recipes.export import export_adapter

    export_adapter(adapter, out, to=to.value, base=base)
