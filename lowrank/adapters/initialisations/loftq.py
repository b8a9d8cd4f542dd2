"""LoftQ (Li 2023): the factors begin as what quantisation has taken from the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank.adapters.initialisations.pissa import rank_within
from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.errors import InputError
from lowrank.quantisers.registry import quantiser_of

if TYPE_CHECKING:
    from lowrank.adapters.methods.lora import LoraLayer


def loftq(layer: LoraLayer, module: HostModule, kind: Kind) -> None:
    """Refuses every base that has no quantisation error; the factors come from `correct_quantisation`."""
    quantiser = quantiser_of(module)
    if quantiser is None or quantiser.bits(module) != 4:
        raise InputError(
            f"init_lora_weights: loftq corrects a 4-bit base, and this {type(module).__name__} is not one",
            fix="Load the base with load_in_4bit, or take another initialisation.",
        )


@torch.no_grad()
def correct_quantisation(layer: LoraLayer, module: HostModule, kind: Kind, original: torch.Tensor) -> None:
    """s · B · A = the best rank-r approximation of W - Q(W) (algorithm 1 with the quantised base given).

    Args:
        layer: What is filled.
        module: The quantised module.
        kind: Its kind.
        original: W (out, in), as it was before it was quantised.
    """
    if original.shape != (shape := kind.shape(module)):
        raise InputError(f"loftq: the original weight has the shape {tuple(original.shape)}, the module's is {shape}")
    r = rank_within("loftq", layer, shape)
    lost = original.to(layer.lora_A) - kind.weight(module).to(layer.lora_A)
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    root = (S[:r] / layer.scale).sqrt()
    layer.lora_A.copy_(root[:, None] * Vh[:r])
    layer.lora_B.copy_(U[:, :r] * root)
