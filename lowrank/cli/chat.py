"""`lowrank chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = 'Example: lowrank chat runs/quickstart --prompt "Wake me at 7"'


def chat(
    path: Annotated[
        str, typer.Argument(metavar="MODEL_OR_ADAPTER", help="A model's folder or name, or an adapter's folder.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Answer this and end, instead of a conversation. May be given several times."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file; each line is a prompt of its own.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to a model, with an adapter or without."""
    from lowrank.recipes.chat import chat as run

    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts is not None else []
    asked = [*(prompt or []), *filter(str.strip, lines)]
    run(path, prompts=asked, system=system, max_new_tokens=max_new_tokens)
