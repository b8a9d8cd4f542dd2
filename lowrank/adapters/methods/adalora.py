"""AdaLoRA (Zhang 2023): ΔW = s · P · Λ · Q. B holds P (out, r), E the diagonal of Λ (r, 1), A holds Q (r, in)."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from lowrank.adapters.config import AdaLoraConfig
from lowrank.adapters.kinds.kind import HostModule, Kind, groups_of
from lowrank.adapters.methods.layer import LowRankLayer, factor_parameter, factor_shapes, own_bias
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

_EPSILON = 1e-5  # peft divides by r + 1e-5, and files are shared with it


class AdaLoraLayer(LowRankLayer):
    """One AdaLoRA adapter on one module.

    Attributes:
        lora_A: (r, in).
        lora_E: (r, 1).
        lora_B: (out, r).
        kept: (r,), False where the budget has pruned a triplet.
    """

    kept: torch.Tensor

    def __init__(
        self,
        lora_A: nn.Parameter,
        lora_E: nn.Parameter,
        lora_B: nn.Parameter,
        scale: float,
        dropout: float,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__(scale, dropout, bias)
        self.lora_A, self.lora_E, self.lora_B = lora_A, lora_E, lora_B
        self.register_buffer("kept", torch.ones(lora_A.shape[0], dtype=torch.bool, device=lora_A.device))

    @classmethod
    def build(cls, config: AdaLoraConfig, path: str, module: HostModule, kind: Kind) -> Self:
        """See `LowRankLayer.build`; a rank pattern in the config gives the ranks that an earlier run has kept."""
        if kind.looked_up:
            raise InputError(f"AdaLoRA fits linear layers and convolutions, and {path} is an embedding")
        if groups_of(module) > 1:
            raise InputError(f"AdaLoRA does not fit {path}, a convolution with {module.groups} groups")
        kept = (config.rank_pattern or {}).get(f"{path}.lora_E")
        shape_A, shape_B = factor_shapes(kind, module, config.init_r if kept is None else sum(kept))
        lora_A, lora_B = factor_parameter(shape_A, module), factor_parameter(shape_B, module)
        lora_E = factor_parameter((shape_A[0], 1), module)
        with torch.no_grad():
            spread = 0.02 if config.init_lora_weights else 1.0
            nn.init.normal_(lora_A, std=spread)
            nn.init.normal_(lora_B, std=spread)
            nn.init.zeros_(lora_E) if config.init_lora_weights else nn.init.normal_(lora_E)
        return cls(lora_A, lora_E, lora_B, _scale(config), config.lora_dropout, own_bias(config, module))

    @staticmethod
    def from_file(config: AdaLoraConfig, path: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> LowRank:
        """See `LowRankLayer.from_file`."""
        return LowRank(tensors["lora_A"] * tensors["lora_E"], tensors["lora_B"], _scale(config))

    def term(self, module: HostModule, kind: Kind) -> LowRank:
        """Λ is folded into A, (r, in): small beside a product with the inputs."""
        return LowRank(
            self.lora_A * self.lora_E, self.lora_B, self.scale, dropout=self.dropout if self.training else 0.0
        )

    def in_file(self, module: HostModule, kind: Kind) -> dict[str, torch.Tensor]:
        """See `Layer.in_file`: peft's AdaLoRA keeps two dimensions and adds no `.weight`."""
        return self.factors() if self.bias is None else {**self.factors(), "base_layer.bias": self.bias}

    def factors(self) -> dict[str, torch.Tensor]:
        """See `LowRankLayer.factors`."""
        return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}


def _scale(config: AdaLoraConfig) -> float:
    return config.lora_alpha / (config.init_r + _EPSILON)
