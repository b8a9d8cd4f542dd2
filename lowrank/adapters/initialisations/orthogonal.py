"""Orthogonal factors: B · A = 0 although neither is zero, so that both learn from the first step."""

from __future__ import annotations

import torch

from lowrank.adapters.initialisations.site import Site, Start
from lowrank.errors import InputError


def orthogonal(site: Site) -> Start:
    """A from the odd rows of a random rotation (r, r), B from its even rows. Needs an even rank.

    Source: https://datta0.github.io/posts/rethink-lora-init/
    """
    r, in_features = site.A.shape
    if r % 2:
        raise InputError(f"init_lora_weights: orthogonal needs an even rank, and r is {r}")
    rotation, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))
    A = rotation[0::2].t() @ torch.randn(r // 2, in_features, dtype=torch.float64)
    B = torch.randn(site.B.shape[0], r // 2, dtype=torch.float64) @ rotation[1::2]
    return Start(A / 10.0, B / 10.0)
