"""Quantised bases whose own kernels have no backward pass: read dense where that is known how, else refused."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.quantization_config import Mxfp4Config, QuantizationConfigMixin

from lowrank.errors import InputError
from lowrank.quantisers.registry import offers


def dense_config(noted: PreTrainedConfig) -> QuantizationConfigMixin | None:
    """What has transformers unpack a base's weights while it reads them; None for a base that it reads as it is.

    mxfp4's kernels have no backward pass (gpt-oss is published in it).
    """
    quantised = getattr(noted, "quantization_config", None)
    if isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4":
        return Mxfp4Config(dequantize=True)
    return None


def refuse_untrainable(model: nn.Module) -> None:
    """Raises InputError for a model whose quantiser, as transformers has it, passes no gradients on."""
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_trainable:
        method = quantiser.quantization_config.quant_method
        name = getattr(method, "value", method)
        raise InputError(
            f"this {type(model).__name__} is quantised by {name}, whose kernels do not train",
            fix=f"Load it dense (dequantize=True in its quantization_config), or quantise a dense one {offers()}.",
        )
