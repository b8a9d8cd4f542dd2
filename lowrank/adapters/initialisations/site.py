"""Where factors are to begin, and what an initialisation has made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.errors import InputError


@dataclass(frozen=True, slots=True)
class Outside:
    """What initialisations were given besides the model.

    Attributes:
        directions: For EVA: the leading directions (k, in) of each module's inputs, by its path.
        originals: For LoftQ: gives a weight (out, in) as it was before it was quantised, by name.
    """

    directions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    originals: Callable[[str], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """One module whose factors are to begin.

    Attributes:
        path: The module's.
        module: Itself.
        kind: Its kind.
        A, B: Empty, of the shape, dtype and device that the factors have: (r, in), (out, r).
        scale: s of ΔW = s · B · A.
        outside: What was given besides the model.
    """

    path: str
    module: HostModule
    kind: Kind
    A: torch.Tensor
    B: torch.Tensor
    scale: float
    outside: Outside = Outside()

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    def weight(self) -> torch.Tensor:
        """W (out, in), in the factors' dtype."""
        return self.kind.weight(self.module).to(self.A.dtype)

    def rank_within(self, how: str) -> int:
        """The rank. Raises InputError if W has fewer directions to begin with."""
        shape = self.kind.shape(self.module)
        if self.r > min(shape):
            raise InputError(
                f"init_lora_weights: {how} takes {self.r} directions of a weight, and one of shape {shape} has "
                f"{min(shape)}",
                fix="Lower r, or give those modules a rank of their own in rank_pattern.",
            )
        return self.r


@dataclass(frozen=True, slots=True)
class Start:
    """Factors to begin with.

    Attributes:
        A: (r, in).
        B: (out, r).
        subtracted: Whether what they stand for is subtracted, so that the adapted model starts as the base and the base
            itself is never changed.
    """

    A: torch.Tensor
    B: torch.Tensor
    subtracted: bool = False
