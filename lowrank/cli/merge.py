"""`lowrank merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from lowrank.cli.options import TrustRemoteCode
from lowrank.weights.merging.merge_choices import MergedDtype, Rounding, Tried

EXAMPLE = "Example: lowrank merge runs/quickstart"


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder: a run, or a checkpoint.")],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The merged model's folder, which must not exist; by default the adapter's with -merged at its end.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
    dtype: Annotated[MergedDtype | None, typer.Option(help="Of the merged weights; the base's by default.")] = None,
    rounding: Annotated[Rounding, typer.Option(help="stochastic keeps small changes on average.")] = "nearest",
    onto: Annotated[
        str,
        typer.Option(
            metavar="[dequantised|original]",
            help="For a quantised base: the weights that it stands for, as in training, or the original ones, which "
            "the adapter was not trained on. The result is never quantised again: that would lose the adapter.",
        ),
    ] = "dequantised",
    trained_over: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="How the base was quantised in training, by default as the adapter says (peft's do not): nf4, int8 "
            "...; none for not at all. A wrong one is answered with all that there are.",
        ),
    ] = None,
    verify: Annotated[
        Tried,
        typer.Option(
            help="tensors: each changed one is tried on a random vector as it is made. answers: base and adapter, and "
            "then the merged model, are loaded and answer a few prompts besides.",
        ),
    ] = "tensors",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Try nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add an adapter to its base: a plain model folder that transformers loads without lowrank."""
    from lowrank.recipes.merge import Onto, merge_adapter

    merge_adapter(
        adapter,
        out,
        base,
        dtype=dtype,
        rounding=rounding,
        onto=cast("Onto", onto),  # checked there, with a reason that a list of choices could not give
        quantization=trained_over,
        verify=False if no_verify else "answers" if verify == "answers" else True,
        trust_remote_code=trust_remote_code,
    )
