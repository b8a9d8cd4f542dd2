"""OLoRA (Büyükakyüz 2024): the factors begin as the leading part of the base weight's QR decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank.adapters.initialisations.pissa import rank_within, start_from
from lowrank.adapters.kinds.kind import HostModule, Kind

if TYPE_CHECKING:
    from lowrank.adapters.methods.lora import LoraLayer


def olora(layer: LoraLayer, module: HostModule, kind: Kind) -> None:
    """W = Q · R; B is the first r columns of Q, A the first r rows of R."""
    r = rank_within("olora", layer, kind.shape(module))
    Q, R = torch.linalg.qr(kind.weight(module).to(layer.lora_A.dtype))
    start_from(layer, A=R[:r], B=Q[:, :r])
