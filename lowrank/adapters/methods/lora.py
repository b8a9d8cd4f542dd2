"""LoRA (Hu 2021): ΔW = s · B · A, s = lora_alpha / r; rsLoRA (Kalajdzievski 2023): s = lora_alpha / √r."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.initialisations import initialise
from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.adapters.methods.layer import LowRankLayer, factor_parameter, factor_shapes, own_bias, rank_and_scale
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank


class LoraLayer(LowRankLayer):
    """One LoRA adapter on one module.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        lora_bias: (out,), what `lora_bias` trains behind B; None without it.
        start_A, start_B: For initialisations that begin at the base's own directions (PiSSA, OLoRA): the factors at the
            start. What they stand for is subtracted: the adapted model starts as the base, which stays untouched.
    """

    start_A: torch.Tensor | None
    start_B: torch.Tensor | None

    def __init__(
        self,
        lora_A: nn.Parameter,
        lora_B: nn.Parameter,
        scale: float,
        dropout: float,
        bias: nn.Parameter | None,
        lora_bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(scale, dropout, bias)
        self.lora_A, self.lora_B, self.lora_bias = lora_A, lora_B, lora_bias
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @classmethod
    def build(cls, config: LoraConfig, path: str, module: HostModule, kind: Kind) -> Self:
        """See `LowRankLayer.build`."""
        r, scale = rank_and_scale(config, path)
        shape_A, shape_B = factor_shapes(kind, module, r)
        lora_A, lora_B = factor_parameter(shape_A, module), factor_parameter(shape_B, module)
        lora_bias = _zero_bias(path, module, kind) if config.lora_bias else None
        layer = cls(lora_A, lora_B, scale, config.lora_dropout, own_bias(config, module), lora_bias)
        initialise(layer, config.init_lora_weights, module, kind)
        return layer

    @staticmethod
    def from_file(config: LoraConfig, path: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> LowRank:
        """See `LowRankLayer.from_file`."""
        return LowRank(tensors["lora_A"], tensors["lora_B"], rank_and_scale(config, path)[1])

    def term(self, module: HostModule, kind: Kind) -> LowRank:
        """s · B · A, less what the factors began with."""
        A, B = self.lora_A, self.lora_B
        if self.start_A is not None and self.start_B is not None:
            A, B = torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)
        return LowRank(A, B, self.scale, dropout=self.dropout if self.training else 0.0)

    def factors(self) -> dict[str, torch.Tensor]:
        """See `LowRankLayer.factors`."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def acting_bias(self, module: HostModule) -> torch.Tensor | None:
        """See `LowRankLayer.acting_bias`; the bias behind B carries the scale, as B does."""
        bias = super().acting_bias(module)
        if self.lora_bias is None:
            return bias
        added = self.scale * self.lora_bias
        return added if bias is None else bias + added

    def in_file(self, module: HostModule, kind: Kind) -> dict[str, torch.Tensor]:
        """See `Layer.in_file`."""
        named = super().in_file(module, kind)
        return named if self.lora_bias is None else {**named, "lora_B.bias": self.lora_bias}

    def check_mergeable(self, path: str, module: HostModule) -> None:
        """See `LowRankLayer.check_mergeable`; a module that was built without a bias does not get one."""
        super().check_mergeable(path, module)
        if self.lora_bias is not None and module.bias is None:
            raise InputError(
                f"{path} cannot be merged: lora_bias trained a bias, and it has none",
                fix="Use the adapter without merging it.",
            )


def _zero_bias(path: str, module: HostModule, kind: Kind) -> nn.Parameter:
    if kind.looked_up:
        raise InputError(f"lora_bias does not fit {path}: an embedding has no bias")
    bias = factor_parameter((kind.shape(module)[0],), module)
    nn.init.zeros_(bias)
    return bias
