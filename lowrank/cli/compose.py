"""`lowrank compose` and `lowrank resize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.weights.arithmetic.compose_methods import ComposeMethod, MajoritySign

EXAMPLE = "Example: lowrank compose runs/a runs/b --out runs/both --method ties --weight 0.7 --weight 0.3 --density 0.5"
RESIZE_EXAMPLE = "Example: lowrank resize runs/a runs/a-r4 --rank 4"


Energy = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="As many ranks as keep this share of ‖ΔW‖²; by default --rank says how many."),
]


def compose(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapters' folders.")],
    out: Annotated[Path, typer.Option(help="The new adapter's folder.")],
    method: Annotated[ComposeMethod, typer.Option(help="cat is exact: ranks add.")] = "cat",
    weight: Annotated[
        list[float], typer.Option(help="One for each adapter, 1 by default; below 0 takes it away.")
    ] = [],  # noqa: B006
    rank: Annotated[
        int | None, typer.Option(min=1, help="For svd and its kin: the rank; by default the largest of the adapters'.")
    ] = None,
    energy: Energy = None,
    density: Annotated[
        float | None, typer.Option(help="Share of values kept by ties, dare and prune, which have no default.")
    ] = None,
    majority_sign: Annotated[
        MajoritySign, typer.Option(help="Whose sign wins in ties: by the sum of the values, or by their number.")
    ] = "total",
    seed: Annotated[int, typer.Option(help="Of dare's random pruning.")] = 0,
) -> None:
    """Make one adapter of several; of one, with a weight: scale or negate it."""
    from lowrank.recipes.compose import compose_adapters

    compose_adapters(
        adapters,
        out,
        weights=weight or None,
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
    )


def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new adapter's folder.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="The rank of the result; no default, unless --energy is given.")
    ] = None,
    energy: Energy = None,
) -> None:
    """Bring an adapter to a lower rank, and say what that loses."""
    from lowrank.recipes.compose import resize_adapter

    resize_adapter(adapter, out, rank=rank, energy=energy)
