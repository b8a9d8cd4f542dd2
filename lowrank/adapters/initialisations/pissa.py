"""PiSSA (Meng 2024): the factors begin as the leading singular directions of the base weight."""

from __future__ import annotations

import torch

from lowrank.adapters.initialisations.site import Site, Start


def pissa(site: Site, iterations: int | None = None) -> Start:
    """s · B · A = the best rank-r approximation of W, split evenly: B = U√S / √s, A = √S·Vᵀ / √s.

    Args:
        site: The module.
        iterations: None for the exact decomposition, else the power iterations of the randomised one (Halko 2011).

    Raises:
        InputError: r is above the smaller side of W.
    """
    r, weight = site.rank_within("pissa"), site.weight()
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.t()
    root = (S / site.scale).sqrt()
    return Start(A=root[:, None] * Vh, B=U * root, subtracted=True)
