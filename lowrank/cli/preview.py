"""`lowrank preview`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import ConfigPath, Overrides

EXAMPLE = "Example: lowrank preview configs/quickstart.yaml --row 3"


def preview(
    config: ConfigPath,
    row: Annotated[int | None, typer.Option(min=1, help="Show this row; by default the first pack.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page here; by default it is shown on the terminal.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads it)
) -> None:
    """Show what would be trained on, token by token: what carries loss, where examples end."""
    from lowrank.config import load_config

    load_config(config, overrides)  # its mistakes are told before torch is loaded

    from lowrank.recipes.preview import preview as run

    run(config, overrides, row=row, html=html)
