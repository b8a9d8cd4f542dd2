"""`lowrank eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import ConfigPath, Overrides

EXAMPLE = "Example: lowrank eval runs/quickstart --data more.jsonl"


def evaluate(
    config: ConfigPath,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's folder. Without it a run's own, and the base for a config's file.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Evaluate on this; by default on the config's data.eval.")] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads it)
) -> None:
    """Loss, perplexity and exact match of a base or an adapter on the config's evaluation data."""
    from lowrank.config import load_config

    if data is not None:
        overrides = [*overrides, f"data.eval={json.dumps(data)}"]
    run_config = load_config(config, overrides)  # its mistakes are told before torch is loaded

    from lowrank.recipes.evaluate import evaluate as run

    run(run_config, adapter or (config if (config / "adapter_config.json").is_file() else None))
