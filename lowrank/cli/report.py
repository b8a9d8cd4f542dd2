"""`lowrank report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank report runs/quickstart runs/quickstart-2"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="The folders of two to eight runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("runs.html"),
) -> None:
    """Write one page of several runs: curves over one another, what differs between the configs, the results."""
    from lowrank.recipes.report import report as run

    run(runs, out)
