"""`lowrank chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank.cli.options import TrustRemoteCode
from lowrank.errors import InputError

EXAMPLE = 'Example: lowrank chat runs/quickstart --prompt "Wake me at 7"'


Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL_OR_ADAPTER ...",
        help="A model's folder or name, or an adapter's folder; with --compare several adapters of one base.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="Answer this and end; by default there is a conversation. May be given several times."),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="A text file; each line is a prompt of its own; by default none is read."
    ),
]
Base = Annotated[str | None, typer.Option(help="The adapter's base; by default the one that the adapter names.")]
UseAdapter = Annotated[
    bool, typer.Option("--adapter/--no-adapter", help="Without: the adapter's base alone, asked as the adapter is.")
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Show the adapter's answers beside its base's, or those of several adapters.",
    ),
]
System = Annotated[
    str | None,
    typer.Option(help='The system message; by default the one that the training rows shared. "" for none.'),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Temperature = Annotated[
    float | None, typer.Option(help="Draw tokens at this temperature; answers are greedy by default, and at 0.")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw from the likeliest tokens that hold this share together; by default from all."),
]
TopK = Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens; by default from all.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Makes drawn answers repeatable; set before each answer. By default they differ each time."),
]


def chat(
    paths: Paths,
    prompt: Prompt = None,
    prompts: Prompts = None,
    base: Base = None,
    use_adapter: UseAdapter = True,
    compare: Compare = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model, with an adapter or without.

    In a conversation /help lists the commands (/system, /reset, /save ...), and Ctrl-C ends an answer.
    """
    from lowrank.recipes.chat import chat as run
    from lowrank.recipes.compare import compare as beside
    from lowrank.recipes.parts.sampling import Sampling

    options: dict[str, Any] = {
        "prompts": [*(prompt or []), *(lines_of(prompts) if prompts is not None else [])],
        "system": system,
        "max_new_tokens": max_new_tokens,
        "base": base,
        "trust_remote_code": trust_remote_code,
        "sampling": Sampling(temperature, top_p, top_k, seed),
    }
    if compare:
        if not use_adapter:
            raise InputError("--compare shows the base beside the adapter already", fix="Leave out --no-adapter.")
        beside(paths, **options)
        return
    if len(paths) > 1:
        raise InputError("one model answers at a time", fix="Ask several adapters with --compare.")
    run(paths[0], use_adapter=use_adapter, **options)


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
