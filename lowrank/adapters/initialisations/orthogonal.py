"""Orthogonal factors: B · A = 0 although neither is zero, so that both learn from the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.errors import InputError

if TYPE_CHECKING:
    from lowrank.adapters.methods.lora import LoraLayer


def orthogonal(layer: LoraLayer, module: HostModule, kind: Kind) -> None:
    """A from the odd rows of a random rotation (r, r), B from its even rows. Needs an even rank.

    Source: https://datta0.github.io/posts/rethink-lora-init/
    """
    r, in_features = layer.lora_A.shape
    if r % 2:
        raise InputError(f"init_lora_weights: orthogonal needs an even rank, and r is {r}")
    rotation, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))
    A = rotation[0::2].t() @ torch.randn(r // 2, in_features, dtype=torch.float64)
    B = torch.randn(layer.lora_B.shape[0], r // 2, dtype=torch.float64) @ rotation[1::2]
    layer.lora_A.copy_(A / 10.0)
    layer.lora_B.copy_(B / 10.0)
