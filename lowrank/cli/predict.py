"""`lowrank predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import TrustRemoteCode

EXAMPLE = 'Example: lowrank predict runs/reviews --text "A lovely film"'


def predict(
    path: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, an adapter's, or a model's.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Predict this. May be given several times; by default --file is read.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, help="Rows as the task was trained on, labels or not; by default none are read."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a line of JSON for each row there; by default they are shown.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The adapter's base; by default the one that the adapter names.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What a merged decoder has learned; by default what its files say.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What a model that has learned labels says to texts, each label with its probability."""
    from lowrank.recipes.predict import predict as run

    run(
        path,
        texts=text or [],
        file=file,
        out=out,
        base=base,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        task=task,
    )
