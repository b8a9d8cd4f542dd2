"""LoftQ (Li 2023): the factors begin as what quantisation has taken from the weight."""

from __future__ import annotations

import torch

from lowrank.adapters.initialisations.site import Site, Start
from lowrank.errors import InputError
from lowrank.quantisers.registry import quantiser_of


def loftq(site: Site) -> Start:
    """s · B · A = the best rank-r approximation of W - Q(W) (algorithm 1 with the quantised base given).

    Raises:
        InputError: the base has no quantisation error, or the original weight does not fit.
    """
    quantiser = quantiser_of(site.module)
    if quantiser is None or quantiser.bits(site.module) != 4:
        raise InputError(
            f"init_lora_weights: loftq corrects a 4-bit base, and this {type(site.module).__name__} is not one",
            fix="Load the base with load_in_4bit, or take another initialisation.",
        )
    assert site.outside.originals is not None, "asked for before any layer is built"
    original = site.outside.originals(f"{site.path}.weight")
    if original.shape != (shape := site.kind.shape(site.module)):
        raise InputError(f"loftq: the original weight has the shape {tuple(original.shape)}, the module's is {shape}")
    r = site.rank_within("loftq")
    U, S, Vh = torch.linalg.svd(original.to(site.A) - site.weight().to(site.A), full_matrices=False)
    root = (S[:r] / site.scale).sqrt()
    return Start(A=root[:, None] * Vh[:r], B=U[:, :r] * root)
