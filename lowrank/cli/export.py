"""`lowrank export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowrank.weights.export_targets import Target

EXAMPLE = (
    "Example: lowrank export runs/quickstart served --to vllm; from mlx-lm: "
    "lowrank export adapters for-peft --to peft; "
    "to the hub: lowrank export runs/quickstart user/name --to hub --dry-run"
)


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder: peft's, or mlx-lm's.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where it goes; for hub a repository's name, user/name.")],
    to: Annotated[Literal[Target, "hub"], typer.Option(help="Who will read it.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
    private: Annotated[bool, typer.Option("--private", help="hub: a repository that is made is private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="hub: say what would be uploaded, without the network.")
    ] = False,
) -> None:
    """Write an adapter so that another program reads it, or upload it to the hub, and say how it is used."""
    from lowrank.errors import InputError
    from lowrank.recipes.export import export_adapter, upload_adapter

    if to == "hub":
        if base is not None:
            raise InputError("--base says nothing to the hub", fix="Leave it out.")
        upload_adapter(adapter, out.as_posix(), private=private, dry_run=dry_run)
        return
    if private or dry_run:
        raise InputError(f"--{'private' if private else 'dry-run'} is for --to hub", fix="Leave it out.")
    export_adapter(adapter, out, to=to, base=base)
