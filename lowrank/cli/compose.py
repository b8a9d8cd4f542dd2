"""`lowrank compose` and `lowrank resize`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: lowrank compose runs/a runs/b --out runs/both --method ties --weight 0.7 --weight 0.3 --density 0.5"
RESIZE_EXAMPLE = "Example: lowrank resize runs/a runs/a-r4 --rank 4"


class Method(StrEnum):
    """How adapters become one."""

    cat = "cat"
    svd = "svd"
    linear = "linear"
    ties = "ties"
    ties_svd = "ties_svd"
    dare_linear = "dare_linear"
    dare_linear_svd = "dare_linear_svd"
    dare_ties = "dare_ties"
    dare_ties_svd = "dare_ties_svd"
    magnitude_prune = "magnitude_prune"
    magnitude_prune_svd = "magnitude_prune_svd"


class MajoritySign(StrEnum):
    """How ties elects a sign."""

    total = "total"
    frequency = "frequency"


Energy = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="As many ranks as keep this share of ‖ΔW‖²; by default --rank says how many."),
]


def compose(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapters' folders.")],
    out: Annotated[Path, typer.Option(help="The new adapter's folder.")],
    method: Annotated[Method, typer.Option(help="cat is exact: ranks add.")] = Method.cat,
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
    ] = MajoritySign.total,
    seed: Annotated[int, typer.Option(help="Of dare's random pruning.")] = 0,
) -> None:
    """Make one adapter of several; of one, with a weight: scale or negate it."""
    from lowrank.recipes.compose import compose_adapters

    compose_adapters(
        adapters,
        out,
        weights=weight or None,
        method=method.value,
        rank=rank,
        energy=energy,
        density=density,
        majority_sign=majority_sign.value,
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
