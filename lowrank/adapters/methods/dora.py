"""DoRA (Liu 2024): W' = m · (W + s·B·A) / ‖W + s·B·A‖, the norm of each row taken as a constant (section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.methods.lora import LORA_A, LORA_B, Lora, LoraConfig
from lowrank.adapters.methods.method import Holder, Matrix, Outset, Tensors
from lowrank.ops.low_rank import LowRank

if TYPE_CHECKING:
    import torch


class Dora(Lora):
    """DoRA: LoRA's factors, and a magnitude (out,) for each row of W. peft knows it by a field of LoRA's config."""

    name = "dora"
    summary = "DoRA: the direction of each weight by low-rank factors, its magnitude by a vector."
    fixed: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    factors = (LORA_A, LORA_B, Factor("lora_magnitude_vector", "lora_magnitude_vector", "row"))
    has_gain = True
    in_transformers = False

    def shapes(self, config: LoraConfig, matrix: Matrix, r: int) -> dict[str, tuple[int, ...]]:
        """LoRA's, and m (out,)."""
        return {**super().shapes(config, matrix, r), "lora_magnitude_vector": (matrix.out,)}

    def start(self, layer: Holder, config: LoraConfig, module: Any, matrix: Matrix, outset: Outset) -> None:
        """The magnitude starts as the norm, so that W' = W where ΔW = 0."""
        from lowrank.ops.dora_norm import dora_norm

        super().start(layer, config, module, matrix, outset)
        term = super().term(layer, module)
        layer.lora_magnitude_vector.copy_(dora_norm(layer.kind.weight(module), term.A, term.B, term.scale))
        self.forget(layer)

    def gain(self, tensors: Tensors, weight: torch.Tensor, term: LowRank) -> torch.Tensor:
        """m / ‖W + ΔW‖."""
        from lowrank.ops.dora_norm import dora_norm

        return _gain(tensors["lora_magnitude_vector"], dora_norm(weight.to(term.A.dtype), term.A, term.B, term.scale))

    def row_norms(self, tensors: Tensors) -> torch.Tensor:
        """m."""
        return tensors["lora_magnitude_vector"]

    def term(self, layer: Holder, module: Any) -> LowRank:
        """LoRA's term with the gain m / ‖W + ΔW‖."""
        term = super().term(layer, module)
        norm = _norm(layer, module, LowRank(term.A.detach(), term.B.detach(), term.scale))
        return LowRank(term.A, term.B, term.scale, _gain(layer.lora_magnitude_vector, norm))

    def forget(self, layer: Holder) -> None:
        """The norms."""
        layer.frozen_norm2 = layer.eval_norm = None


def _norm(layer: Holder, module: Any, term: LowRank) -> torch.Tensor:
    """‖W + ΔW‖. ‖W‖² is kept for as long as W is the same; the whole norm too, where the factors are frozen."""
    import torch

    from lowrank.adapters.kinds.wide import products_in
    from lowrank.adapters.methods.kept import Kept
    from lowrank.ops.dora_norm import dora_norm, row_norm2

    weight = layer.kind.weight(module).detach()
    weight = weight.to(products_in(module, weight.dtype))
    if torch.compiler.is_compiling():
        return dora_norm(weight, term.A, term.B, term.scale)
    still = not (layer.training or layer.lora_A.requires_grad or layer.lora_B.requires_grad)
    parts = (module.weight, layer.lora_A, layer.lora_B)
    if still and layer.eval_norm is not None and layer.eval_norm.of(parts, term.scale):
        return layer.eval_norm.value
    if layer.frozen_norm2 is None or not layer.frozen_norm2.of((module.weight,)):
        layer.frozen_norm2 = Kept(row_norm2(weight, term.A.dtype), (module.weight,))
    norm = dora_norm(weight, term.A, term.B, term.scale, layer.frozen_norm2.value)
    layer.eval_norm = Kept(norm, parts, term.scale) if still else None
    return norm


def _gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """m / ‖·‖; a row of W that is all zero has no direction, and stays zero."""
    import torch

    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)
