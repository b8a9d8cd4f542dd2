"""A frozen weight of a layer, and the module that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Held:
    """A parameter where it is held.

    Attributes:
        module: Whose own it is.
        name: Its name there.
        parameter: Itself.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter
