"""`lowrank eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import ConfigPath, Overrides

EXAMPLE = "Example: lowrank eval configs/quickstart.yaml --adapter runs/quickstart"


def evaluate(
    config: ConfigPath,
    adapter: Annotated[Path | None, typer.Option(help="An adapter's folder; without it the base is evaluated.")] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads it)
) -> None:
    """Loss, perplexity and exact match of a base or an adapter on the config's evaluation data."""
    from lowrank.config import load_config

    run_config = load_config(config, overrides)  # its mistakes are told before torch is loaded

    from lowrank.recipes.evaluate import evaluate as run

    run(run_config, adapter)
