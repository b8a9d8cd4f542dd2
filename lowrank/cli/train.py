"""`lowrank train`."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli.options import ConfigPath, Overrides

EXAMPLE = "Example: lowrank train configs/quickstart.yaml --set training.learning_rate=5e-4"


def train(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006  (typer reads it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in training.output_dir.")] = False,
) -> None:
    """Fine-tune a model as a config says: adapter, metrics and report go to its output folder."""
    from lowrank.config import load_config

    run_config = load_config(config, overrides)  # its mistakes are told before torch is loaded

    from lowrank.recipes.train import train as run

    run(run_config, resume=resume)
