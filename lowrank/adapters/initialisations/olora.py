"""OLoRA (Büyükakyüz 2024): the factors begin as the leading part of the base weight's QR decomposition."""

from __future__ import annotations

import torch

from lowrank.adapters.initialisations.site import Site, Start


def olora(site: Site) -> Start:
    """W = Q · R; B is the first r columns of Q, A the first r rows of R."""
    r = site.rank_within("olora")
    Q, R = torch.linalg.qr(site.weight())
    return Start(A=R[:r], B=Q[:, :r], subtracted=True)
