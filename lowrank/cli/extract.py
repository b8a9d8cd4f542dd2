"""`lowrank extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank extract base-model tuned-model adapter --energy 0.9"


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model's folder or name.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model's folder or name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder.")],
    r: Annotated[
        int | None, typer.Option("--rank", "--r", min=1, help="Of every module; no default, unless --energy is given.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of ‖ΔW‖² to keep; by default --rank says how much.")
    ] = None,
) -> None:
    """Make a LoRA of the difference of two models."""
    from lowrank.recipes.extract import extract_adapter

    extract_adapter(base, tuned, out, r=r, energy=energy)
