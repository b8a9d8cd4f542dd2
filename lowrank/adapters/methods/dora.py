"""DoRA (Liu 2024): W' = m · (W + s·B·A) / ‖W + s·B·A‖, the norm of each row taken as a constant (section 4.3)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.adapters.methods.kept import Kept
from lowrank.adapters.methods.layer import factor_parameter, rank_and_scale
from lowrank.adapters.methods.lora import LoraLayer
from lowrank.ops.dora_norm import dora_norm, row_norm2
from lowrank.ops.low_rank import LowRank


class DoraLayer(LoraLayer):
    """One DoRA adapter on one module: LoRA's factors, and a magnitude (out,) for each row of W."""

    lora_magnitude_vector: nn.Parameter
    _frozen_norm2: Kept | None
    _eval_norm: Kept | None

    @classmethod
    def build(cls, config: LoraConfig, path: str, module: HostModule, kind: Kind) -> Self:
        """See `LowRankLayer.build`; the magnitude starts as the norm, so that W' = W where ΔW = 0."""
        layer = super().build(config, path, module, kind)
        term = LoraLayer.term(layer, module, kind)
        with torch.no_grad():
            norm = dora_norm(kind.weight(module), term.A, term.B, term.scale)
            layer.lora_magnitude_vector = factor_parameter(norm.shape, module)
            layer.lora_magnitude_vector.copy_(norm)
        layer._frozen_norm2 = layer._eval_norm = None
        return layer

    @staticmethod
    def from_file(config: LoraConfig, path: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> LowRank:
        """See `LowRankLayer.from_file`."""
        A, B = tensors["lora_A"].float(), tensors["lora_B"].float()
        scale = rank_and_scale(config, path)[1]
        norm = dora_norm(weight.float(), A, B, scale)
        return LowRank(A, B, scale, gain=_gain(tensors["lora_magnitude_vector"].float().flatten(), norm))

    def term(self, module: HostModule, kind: Kind) -> LowRank:
        """LoRA's term with the gain m / ‖W + ΔW‖."""
        term = super().term(module, kind)
        with torch.no_grad():
            norm = self._norm(module, kind, term)
        return LowRank(term.A, term.B, term.scale, _gain(self.lora_magnitude_vector, norm), term.dropout)

    def _norm(self, module: HostModule, kind: Kind, term: LowRank) -> torch.Tensor:
        """‖W + ΔW‖. ‖W‖² is kept for as long as W is the same; the whole norm too, where the factors are frozen."""
        if torch.compiler.is_compiling():
            return dora_norm(kind.weight(module), term.A, term.B, term.scale)
        weight = kind.weight(module)
        still = not (self.training or self.lora_A.requires_grad or self.lora_B.requires_grad)
        parts = (module.weight, self.lora_A, self.lora_B)
        if still and self._eval_norm is not None and self._eval_norm.of(parts, term.scale):
            return self._eval_norm.value
        if self._frozen_norm2 is None or not self._frozen_norm2.of((module.weight,)):
            self._frozen_norm2 = Kept(row_norm2(weight, term.A.dtype), (module.weight,))
        norm = dora_norm(weight, term.A, term.B, term.scale, self._frozen_norm2.value)
        self._eval_norm = Kept(norm, parts, term.scale) if still else None
        return norm

    def train(self, mode: bool = True) -> Self:
        """As of any module; what is kept is made anew."""
        self._frozen_norm2 = self._eval_norm = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._frozen_norm2 = self._eval_norm = None
        return super()._apply(fn, recurse)

    def factors(self) -> dict[str, torch.Tensor]:
        """See `LowRankLayer.factors`."""
        return {**super().factors(), "lora_magnitude_vector": self.lora_magnitude_vector}


def _gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """m / ‖·‖; a row of W that is all zero has no direction, and stays zero."""
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)
