"""`lowrank merge`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank merge runs/quickstart runs/quickstart-merged"


class DType(StrEnum):
    """What merged weights are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Rounding(StrEnum):
    """How sums become the weights' dtype."""

    nearest = "nearest"
    stochastic = "stochastic"


class Onto(StrEnum):
    """What an adapter trained over a quantised base is added to."""

    dequantised = "dequantised"
    original = "original"


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder; it must not exist.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Of the merged weights; the base's by default.")] = None,
    rounding: Annotated[Rounding, typer.Option(help="stochastic keeps small changes on average.")] = Rounding.nearest,
    onto: Annotated[Onto, typer.Option(help="For a 4-bit base: what it was trained over, or the 16-bit original.")] = (
        Onto.dequantised
    ),
    verify: Annotated[
        bool | None, typer.Option(help="Compare with base and adapter; by default where both fit in memory.")
    ] = None,
) -> None:
    """Add an adapter to its base: a plain model folder that transformers loads without lowrank."""
    from lowrank.recipes.merge import merge_adapter

    merge_adapter(
        adapter, out, base, dtype=dtype and dtype.value, rounding=rounding.value, onto=onto.value, verify=verify
    )
