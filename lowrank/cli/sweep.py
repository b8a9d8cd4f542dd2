"""`lowrank sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import Overrides

EXAMPLE = "Example: lowrank sweep examples/sweep.yaml --set training.output_dir=runs/rates"


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config with a section `sweep`.")],
    overrides: Overrides = [],  # noqa: B006  (typer reads it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in training.output_dir.")] = False,
) -> None:
    """Try several values of some keys, side by side over one base, and say which are the best."""
    from lowrank.config.sweeping import read_sweep

    read_sweep(config, overrides)  # its mistakes are told before torch is loaded

    from lowrank.recipes.sweep import sweep as run

    run(config, overrides, resume=resume)
