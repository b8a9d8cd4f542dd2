"""The experts of two checkpoints: a product of low rank for each expert's difference."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import nn

from lowrank.adapters.experts.fused import is_transposed, name_in_file
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.targeting.parameters import parameter_names
from lowrank.errors import InputError
from lowrank.weights.arithmetic.approximate import leading
from lowrank.weights.arithmetic.factors import Product, padded
from lowrank.weights.arithmetic.pairs import Pair


def is_stack(module: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter holds one matrix for each expert, which the module's forward multiplies with.

    Three dimensions alone do not say so: a convolution's kernel has them, a class token, a table of positions.
    """
    if len(shape) != 3 or kind_of(module) is not None or name not in module._parameters:
        return False
    return "expert" in type(module).__name__.lower()


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One parameter's differences, expert by expert: W is (d1, d2) as the model holds it.

    Attributes:
        products: ΔW = B · A for each expert, all of one rank.
        energy: The share of ΣΔW² that they keep, times it; and it.
    """

    products: list[Product]
    energy: tuple[float, float]

    @property
    def rank(self) -> int:
        """Of every expert."""
        return self.products[0].rank


def differing_experts(pair: Pair, name: str, r: int | None, energy: float | None) -> ExpertMatrices | None:
    """The differences of one parameter (experts, d1, d2), None where there is none; one expert is read at a time."""
    products: list[Product] = []
    kept_of_all = whole = 0.0
    experts, d1, d2 = pair.shapes(name)[0]
    one, other = pair.places(name)
    assert one is not None
    assert other is not None
    for expert in range(experts):
        difference = pair.after.read(other, expert).float() - pair.before.read(one, expert).float()
        size = torch.linalg.vector_norm(difference, dtype=torch.float64).square().item()
        if not math.isfinite(size):
            raise InputError(f"{name} holds NaN or infinity in one of the models", where=str(pair.tuned.folder))
        if size == 0.0:
            products.append(Product(torch.zeros(0, d2), torch.zeros(d1, 0)))
            continue
        product, kept = leading(difference, r, energy, zlib.crc32(f"{name}.{expert}".encode()))
        products.append(product)
        kept_of_all, whole = kept_of_all + kept * size, whole + size
    if whole == 0.0:
        return None
    rank = max(product.rank for product in products)
    return ExpertMatrices([padded(product, rank) for product in products], (kept_of_all, whole))


def experts_in_file(
    module: nn.Module, path: str, parameters: dict[str, ExpertMatrices], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """peft's tensors for the parameters of one experts module: see `lowrank.adapters.experts.fused.expert_factors`."""
    names = [name for name in parameter_names(module) if name in parameters]
    tensors = {}
    for name in names:
        products = parameters[name].products
        if is_transposed(module):  # W is (in, out): what stands left of the product is Aᵀ
            A, B = [p.B.T for p in products], [p.A.T for p in products]
        else:
            A, B = [p.A for p in products], [p.B for p in products]
        prefix = f"{path}.{name_in_file(names, name)}"
        tensors[f"{prefix}lora_A.weight"] = torch.cat(A).to(dtype).contiguous()
        # (out, r, experts): an expert's columns stand `experts` apart
        tensors[f"{prefix}lora_B.weight"] = torch.stack(B, dim=2).flatten(1).to(dtype).contiguous()
    return tensors
