"""`lowrank chat`."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = 'Example: lowrank chat runs/quickstart --prompt "Wake me at 7"'


def chat(
    path: Annotated[
        str, typer.Argument(metavar="MODEL_OR_ADAPTER", help="A model's folder or name, or an adapter's folder.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this and end, instead of a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to a model, with an adapter or without."""
    from lowrank.recipes.chat import chat as run

    run(path, prompt=prompt, system=system, max_new_tokens=max_new_tokens)
