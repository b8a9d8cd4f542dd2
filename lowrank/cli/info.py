"""`lowrank info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank info runs/quickstart"


def info(path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter's folder, or a run's.")]) -> None:
    """What an adapter is: method, base, ranks, size, and how much it changes each layer."""
    from lowrank.recipes.info import show_info

    show_info(path)
