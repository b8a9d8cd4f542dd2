"""How much memory a run would take, by rule of thumb; `lowrank check` measures it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.recipes.proposal.base import Base
from lowrank.recipes.proposal.machine import GiB, Machine

NF4 = 0.53  # bytes a weight, scales included
TRAINED = 16  # bytes for each value that trains: itself, its gradient, AdamW's two moments, all in float32
BESIDES = 0.75 * GiB  # the program and its libraries on a CPU, temporaries and the loss's chunk on a card


@dataclass(frozen=True)
class Way:
    """How a base is held and trained.

    Attributes:
        dtype: Of weights.
        computed: Of products, and so of activations.
        four_bits: Whether the linear layers are held in 4 bits.
        recompute: Whether activations are computed again in the backward pass.
        tokens: In one batch.
    """

    dtype: str
    computed: str
    four_bits: bool
    recompute: bool
    tokens: int


def weights(base: Base, way: Way) -> float:
    """Bytes of the base's weights."""
    width = _width(way.dtype)
    whole = base.parameters * width
    return whole - base.linear * (width - NF4) if way.four_bits else whole


def _width(dtype: str) -> int:
    """Bytes of a value."""
    return 4 if dtype == "float32" else 2


def needed(base: Base, way: Way, r: int) -> float:
    """Bytes of a run at its peak."""
    kept = base.layers * base.hidden + base.kept if way.recompute else base.layers * base.kept
    return weights(base, way) + r * base.per_rank * TRAINED + way.tokens * kept * _width(way.computed) + BESIDES


def fits(base: Base, way: Way, r: int, machine: Machine) -> bool:
    """Whether the machine has room for it."""
    return needed(base, way, r) <= machine.room
