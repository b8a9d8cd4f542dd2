"""`lowrank init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import Overrides
from lowrank.errors import InputError
from lowrank.recipes.proposal.goals import Goal

EXAMPLE = "Example: lowrank init data.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct"


def init(
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="The rows: a file, a folder, a pattern.")] = None,
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Where the config goes.")] = Path("run.yaml"),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A folder with a saved model, or a name on the hub; by default it is asked for."
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Rows to evaluate on; by default a share of DATA.")
    ] = None,
    goal: Annotated[Goal, typer.Option(help="What comes first where two things cannot both be had.")] = "quality",
    overrides: Overrides = [],  # noqa: B006  (typer reads it)
    checked: Annotated[bool, typer.Option("--check/--no-check", help="Try the config at the end.")] = True,
) -> None:
    """Look at the rows, the model and this machine, and write a config that runs, every value with its reason."""
    data = data or _asked("DATA", "the rows to train on (a file or a folder)")
    model = model or _asked("--model", "the model (a folder, or a name on the hub)")

    from lowrank.recipes.init import init as run

    run(data, model, path, held_out=held_out, goal=goal, overrides=overrides, checked=checked)


def _asked(name: str, what: str) -> str:
    if not sys.stdin.isatty():
        raise InputError(f"{name} is missing: {what}", fix="Give both: `lowrank init DATA --model MODEL`.")
    return typer.prompt(what, err=True)
