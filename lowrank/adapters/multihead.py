"""torch's `nn.MultiheadAttention`: one adapter on its two matrices, `in_proj_weight` and `out_proj`, as peft has it.

Its forward hands both to one function that multiplies with them, so there is no input to run a low-rank path on: the
adapted matrices are formed, and the module's own forward runs with those.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.linear import LinearKind
from lowrank.adapters.methods.layer import JointLayer, Layer, LowRankLayer
from lowrank.adapters.methods.lora import Lora
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank
from lowrank.ops.merged import merged_weight

OUT_PROJ = "base_layer.out_proj"
"""Where peft's files have the factors of `out_proj`, after the attention's path."""

OUT_PROJ_TWICE = 2.0
"""peft adds ΔW to `out_proj` twice, acting and merged. Its files were trained so, and mean that."""

_LINEAR, _LORA = LinearKind(), Lora()
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


class MultiheadLayer(JointLayer, nn.Module):
    """One LoRA adapter on one attention.

    `lora_dropout` has no input to drop here and is not applied; of the two biases, `bias` trains that of `out_proj`
    (both as in peft).

    Attributes:
        in_proj: On queries, keys and values at once, W (3 · embed_dim, embed_dim).
        out_proj: On the output, W (embed_dim, embed_dim).
    """

    def __init__(self, in_proj: LowRankLayer, out_proj: LowRankLayer) -> None:
        super().__init__()
        self.in_proj, self.out_proj = in_proj, out_proj

    @classmethod
    def build(cls, config: AdapterConfig, path: str, module: HostModule) -> Self:
        """A layer for the attention at `path`.

        Raises:
            InputError: keys or values of a width of their own, or what does not fit an attention.
        """
        if not module._qkv_same_embed_dim:
            raise InputError(f"{path} has keys or values of another width than its queries, and no adapter fits that")
        _check_fields(config, path)
        return cls(
            LowRankLayer.build(_LORA, config, path, _in_projection(module), _LINEAR),
            LowRankLayer.build(_LORA, config, path, module.out_proj, _LINEAR),
        )

    def output_together(self, module: HostModule, layers: Sequence[Layer], *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, on a twin of it that holds the adapted matrices."""
        with torch.autocast(module.in_proj_weight.device.type, enabled=False):
            in_proj, out_proj, bias = _adapted(module, layers)
        projection = _twin(module.out_proj, weight=out_proj.to(module.out_proj.weight.dtype), bias=bias)
        twin = _twin(module, in_proj_weight=in_proj.to(module.in_proj_weight.dtype), out_proj=projection)
        return type(module).forward(twin, *args, **kwargs)

    @torch.no_grad()
    def merge_together(self, module: HostModule, layers: Sequence[Layer]) -> None:
        """Both matrices with the terms of all of `layers`, rounded once."""
        in_proj, out_proj, bias = _adapted(module, layers)
        old = module.in_proj_weight
        module.in_proj_weight = nn.Parameter(in_proj.to(old.dtype), requires_grad=old.requires_grad)
        _LINEAR.write(module.out_proj, out_proj)
        if bias is not module.out_proj.bias and bias is not None:
            module.out_proj.bias = nn.Parameter(bias, requires_grad=module.out_proj.bias.requires_grad)

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """The factors of `in_proj_weight` under the module's own path, those of `out_proj` deeper."""
        inner = self.out_proj.in_file(module.out_proj)
        own = self.in_proj.in_file(_in_projection(module))
        return own | {f"{OUT_PROJ}.{name}": tensor for name, tensor in inner.items()}


def biases(module: HostModule) -> tuple[torch.Tensor | None, ...]:
    """Those that a layer here has decided on: the output's may train, the one of the inputs does not (as in peft)."""
    return module.in_proj_bias, module.out_proj.bias


def _adapted(module: HostModule, layers: Sequence[Layer]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both matrices with the layers' terms, in the dtype of the sum, and the output's bias in its own."""
    mine = [layer for layer in layers if isinstance(layer, MultiheadLayer)]
    if len(mine) < len(layers):
        raise InputError(f"one adapter trains a {type(module).__name__} whole and another adapts it; they cannot add")
    in_proj, out_proj, bias = module.in_proj_weight, _LINEAR.weight(module.out_proj), module.out_proj.bias
    for layer in mine:
        in_proj = merged_weight(in_proj, _term(layer.in_proj))
        out_proj = merged_weight(out_proj, _term(layer.out_proj, OUT_PROJ_TWICE))
        if layer.out_proj.bias is not None:
            bias = bias + (layer.out_proj.bias - module.out_proj.bias).to(bias.dtype)
    return in_proj, out_proj, bias


def _term(layer: LowRankLayer, times: float = 1.0) -> LowRank:
    factors = layer.factors()
    return LowRank(factors["lora_A"], factors["lora_B"], times * layer.scale)


def _in_projection(module: HostModule) -> HostModule:
    """The module's `in_proj_weight` in the form of a linear layer."""
    return SimpleNamespace(
        weight=module.in_proj_weight, bias=None, in_features=module.embed_dim, out_features=3 * module.embed_dim
    )


def _twin(module: HostModule, **attributes: Any) -> HostModule:
    """An instance of the module's class that shares everything with it but these attributes."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(attributes)
    return twin


def _check_fields(config: AdapterConfig, path: str) -> None:
    init = getattr(config, "init_lora_weights", None)
    refused = {
        "method": (config.method_name, config.method_name != "lora"),
        "lora_bias": (True, getattr(config, "lora_bias", False)),
        "init_lora_weights": (init, init not in _INITIALISATIONS),
    }
    for field, (value, is_set) in refused.items():
        if is_set:
            raise InputError(f"{field}: {value} does not fit {path}, a MultiheadAttention", fix="Leave it out there.")
