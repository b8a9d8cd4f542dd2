"""Rounding a merged weight to its file's dtype, and what that loses of the adapter's effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from lowrank.errors import InputError
from lowrank.weights.merging.merge_choices import Rounding


@dataclass(slots=True)
class RoundingLoss:
    """Sums over the weights of a tensor (or of many): ‖ΔW‖², and ‖W' as written - W' as computed‖²."""

    effect2: float = 0.0
    error2: float = 0.0

    def add(self, other: RoundingLoss) -> None:
        """Adds another's sums."""
        self.effect2 += other.effect2
        self.error2 += other.error2

    @property
    def share(self) -> float:
        """The error's norm as a share of the effect's; 0 where the adapter has no effect."""
        return (self.error2 / self.effect2) ** 0.5 if self.effect2 else 0.0


def check_rounding(how: str) -> None:
    """InputError when there is no such way of rounding."""
    if how not in get_args(Rounding):
        raise InputError(f"there is no rounding {how!r}; there are {', '.join(get_args(Rounding))}")


def round_into(out: torch.Tensor, exact: torch.Tensor, how: Rounding, seed: int) -> torch.Tensor:
    """`exact` in the dtype of `out`, to the nearest value or, stochastically, to one of the two neighbours.

    Stochastic rounding takes the upper neighbour with the probability that makes the expected value exact, so that
    updates too small for a bf16 weight are kept on average instead of vanishing.

    Args:
        seed: Of the random bits; the same seed gives the same result.
    """
    dtype = out.dtype
    if how == "nearest" or dtype.itemsize >= exact.element_size():
        return out.copy_(exact)
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bfloat16 and exact.dtype == torch.float32:
        return out.copy_(_stochastic_bf16(exact, generator))
    return out.copy_(_stochastic(exact, dtype, generator))


def _stochastic_bf16(exact: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bf16 is float32's upper half: random bits are added to the lower half and cut off with it."""
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, generator=generator)
    bits = exact.contiguous().view(torch.int32) + noise
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def _stochastic(exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    near = exact.to(dtype)
    back = near.to(exact.dtype)
    up = torch.full_like(near, torch.inf)
    towards = torch.where(exact >= back, up, -up)
    far = torch.nextafter(near.float(), towards.float()) if dtype == torch.float32 else _neighbour(near, exact >= back)
    gap = (far.to(exact.dtype) - back).abs()
    take = torch.rand(exact.shape, dtype=exact.dtype, generator=generator) * gap < (exact - back).abs()
    return torch.where(take, far, near)


def _neighbour(values: torch.Tensor, upwards: torch.Tensor) -> torch.Tensor:
    """The next 16-bit float above or below, by its bits (their order is the values' for one sign)."""
    bits = values.view(torch.int16)
    grows = torch.where(values == 0, True, (values > 0) == upwards)
    stepped = torch.where(grows, bits + 1, bits - 1)
    from_zero = torch.where(upwards, torch.ones_like(bits), torch.full_like(bits, -32767))
    return torch.where(values == 0, from_zero, stepped).view(values.dtype)
