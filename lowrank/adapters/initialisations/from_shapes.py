"""Initialisations that look at nothing but the shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from lowrank.adapters.kinds.kind import HostModule, Kind

if TYPE_CHECKING:
    from lowrank.adapters.methods.lora import LoraLayer


def kaiming(layer: LoraLayer, module: HostModule, kind: Kind) -> None:
    """A uniform (He 2015 with a = √5), B zero: ΔW starts at zero. Embeddings: A zero, B normal (loralib)."""
    if kind.looked_up:
        nn.init.zeros_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    else:
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        nn.init.zeros_(layer.lora_B)


def gaussian(layer: LoraLayer, module: HostModule, kind: Kind) -> None:
    """A normal with deviation 1 / r, B zero."""
    nn.init.normal_(layer.lora_A, std=1.0 / layer.lora_A.shape[0])
    nn.init.zeros_(layer.lora_B)


def uniform(layer: LoraLayer, module: HostModule, kind: Kind) -> None:
    """A and B uniform: ΔW does not start at zero, so that a test sees it."""
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(layer.lora_B, a=math.sqrt(5))
