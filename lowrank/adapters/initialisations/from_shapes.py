"""Initialisations that look at nothing but the shapes."""

from __future__ import annotations

import math

import torch
from torch import nn

from lowrank.adapters.initialisations.site import Site, Start


def kaiming(site: Site) -> Start:
    """A uniform (He 2015 with a = √5), B zero: ΔW starts at zero. Embeddings: A zero, B normal (loralib)."""
    if site.kind.looked_up:
        return Start(torch.zeros_like(site.A), nn.init.normal_(torch.empty_like(site.B)))
    return Start(nn.init.kaiming_uniform_(torch.empty_like(site.A), a=math.sqrt(5)), torch.zeros_like(site.B))


def gaussian(site: Site) -> Start:
    """A normal with deviation 1 / r, B zero."""
    return Start(nn.init.normal_(torch.empty_like(site.A), std=1.0 / site.r), torch.zeros_like(site.B))


def uniform(site: Site) -> Start:
    """A and B uniform: ΔW does not start at zero, so that a test sees it."""
    A, B = (nn.init.kaiming_uniform_(torch.empty_like(factor), a=math.sqrt(5)) for factor in (site.A, site.B))
    return Start(A, B)
