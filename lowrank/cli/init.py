"""`lowrank init`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank init run.yaml --template qlora"


class Template(StrEnum):
    """The configs that can be begun from."""

    quickstart = "quickstart"
    lora = "lora"
    qlora = "qlora"
    dora = "dora"


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where the config goes.")] = Path("run.yaml"),
    template: Annotated[Template, typer.Option(help="What to begin from.")] = Template.lora,
) -> None:
    """Write a commented config to begin from, and the schema that editors check it with."""
    from lowrank.recipes.init import write_config

    write_config(path, template.value)
