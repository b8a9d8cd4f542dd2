"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config; `lowrank init` writes one.")]

Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Stands before what the config says; may be repeated. The value is taken whole (# and : mean nothing in "
        "it), unless it begins with a bracket, a brace or a quote: then it is YAML.",
    ),
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Whether Python code that comes with the model may run.")
]
