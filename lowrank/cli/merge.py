"""`lowrank merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank merge runs/quickstart runs/quickstart-merged"


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder; it must not exist.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
) -> None:
    """Add an adapter to its base: a plain model folder that transformers loads without lowrank."""
    from lowrank.recipes.merge import merge_adapter

    merge_adapter(adapter, out, base)
