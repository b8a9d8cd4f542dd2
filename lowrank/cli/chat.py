"""`lowrank chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.options import TrustRemoteCode
from lowrank.errors import InputError

EXAMPLE = 'Example: lowrank chat runs/quickstart --prompt "Wake me at 7"'


def chat(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_ADAPTER ...",
            help="A model's folder or name, or an adapter's folder; with --compare several adapters of one base.",
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Answer this and end, instead of a conversation. May be given several times."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file; each line is a prompt of its own.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The adapter's base; by default the one that the adapter names.")
    ] = None,
    use_adapter: Annotated[
        bool, typer.Option("--adapter/--no-adapter", help="Without: the adapter's base alone, asked as the adapter is.")
    ] = True,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Show the adapter's answers beside its base's, or those of several adapters."),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help='The system message; by default the one that the training rows shared. "" for none.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens at this temperature; answers are greedy by default, and at 0.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that hold this share together.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable; set before each answer.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model, with an adapter or without.

    In a conversation /help lists the commands (/system, /reset, /save ...), and Ctrl-C ends an answer.
    """
    from lowrank.recipes.chat import chat as run
    from lowrank.recipes.compare import compare as beside
    from lowrank.recipes.parts.sampling import Sampling

    asked = [*(prompt or []), *(lines_of(prompts) if prompts is not None else [])]
    sampling = Sampling(temperature, top_p, top_k, seed)
    if compare:
        if not use_adapter:
            raise InputError("--compare shows the base beside the adapter already", fix="Leave out --no-adapter.")
        beside(
            paths,
            prompts=asked,
            system=system,
            max_new_tokens=max_new_tokens,
            base=base,
            trust_remote_code=trust_remote_code,
            sampling=sampling,
        )
        return
    if len(paths) > 1:
        raise InputError("one model answers at a time", fix="Ask several adapters with --compare.")
    run(
        paths[0],
        prompts=asked,
        system=system,
        max_new_tokens=max_new_tokens,
        base=base,
        use_adapter=use_adapter,
        trust_remote_code=trust_remote_code,
        sampling=sampling,
    )


def lines_of(file: Path) -> list[str]:
    """The lines of a text file that are not blank, as they are: only a line feed ends one.

    Raises:
        InputError: the file is not UTF-8, or has no other lines.
    """
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"the byte 0x{content[error.start]:02x} is not UTF-8", where=f"{file}, line {line}", fix="Save it as UTF-8."
        ) from None
    lines = [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
    if not lines:
        raise InputError("there is no prompt in it", where=str(file), fix="Write one in each line.")
    return lines
