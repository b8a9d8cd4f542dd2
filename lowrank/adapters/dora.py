"""DoRA (Liu 2024): W' = m · (W + s·B·A) / ‖W + s·B·A‖, the norm of each row taken as a constant (section 4.3)."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.kinds import HostModule, Kind
from lowrank.adapters.lora import LoraLayer
from lowrank.adapters.method import factor_parameter, rank_and_scale
from lowrank.ops.dora_norm import dora_norm, row_norm2
from lowrank.ops.low_rank import LowRank


class DoraLayer(LoraLayer):
    """One DoRA adapter on one module: LoRA's factors, and a magnitude (out,) for each row of W."""

    lora_magnitude_vector: nn.Parameter
    _frozen_norm2: tuple[object, torch.Tensor]
    _eval_norm: tuple[object, torch.Tensor]

    @classmethod
    def build(cls, config: LoraConfig, path: str, module: HostModule, kind: Kind) -> Self:
        """See `LowRankLayer.build`; the magnitude starts as the norm, so that W' = W where ΔW = 0."""
        layer = super().build(config, path, module, kind)
        term = LoraLayer.term(layer, module, kind)
        with torch.no_grad():
            norm = dora_norm(kind.weight(module), term.A, term.B, term.scale)
            layer.lora_magnitude_vector = factor_parameter(norm.shape, module)
            layer.lora_magnitude_vector.copy_(norm)
        layer._frozen_norm2 = layer._eval_norm = (None, norm)
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
        frozen = _identity(module.weight)
        whole = (*frozen, *_identity(self.lora_A), *_identity(self.lora_B))
        still = not (self.training or self.lora_A.requires_grad or self.lora_B.requires_grad)
        if still and self._eval_norm[0] == whole:
            return self._eval_norm[1]
        weight = kind.weight(module)
        if self._frozen_norm2[0] != frozen:
            self._frozen_norm2 = (frozen, row_norm2(weight, term.A.dtype))
        norm = dora_norm(weight, term.A, term.B, term.scale, self._frozen_norm2[1])
        self._eval_norm = (whole if still else None, norm)
        return norm

    def factors(self) -> dict[str, torch.Tensor]:
        """See `LowRankLayer.factors`."""
        return {**super().factors(), "lora_magnitude_vector": self.lora_magnitude_vector}


def _gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """m / ‖·‖; a row of W that is all zero has no direction, and stays zero."""
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """What changes when the tensor's values may have: in place, but for writes through `.data`, or by replacement.

    An inference tensor does not count its changes: it is new each time.
    """
    version = object() if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.device
