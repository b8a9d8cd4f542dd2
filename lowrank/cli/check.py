"""`lowrank check`."""

from __future__ import annotations

from lowrank.cli.options import ConfigPath, Overrides

EXAMPLE = "Example: lowrank check configs/quickstart.yaml"


def check(config: ConfigPath, overrides: Overrides = []) -> None:  # noqa: B006  (typer reads it)
    """Do everything that a run would do, short of training: config, data, model, targets, disk, memory."""
    from lowrank.config import load_config

    load_config(config, overrides)  # its mistakes are told before torch is loaded

    from lowrank.recipes.check import check as run

    run(config, overrides)
