"""Layers that other libraries have quantised are refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError


class Coded(torch.Tensor):
    """As torchao's and quanto's: it says that it is float32, and holds codes."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor) * 2


class Packed(nn.Module):
    """As GPTQ's, AWQ's, HQQ's: a linear layer, but none of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))


def fp8() -> nn.Module:
    layer = FP8Linear(32, 32, block_size=(32, 32))
    for values in layer.state_dict().values():  # its scales too are whatever the memory held, NaN at times
        values.zero_()
    return layer


def of_another_type(dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=dtype), requires_grad=False)
    return layer


def coded() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Coded), requires_grad=False)
    return layer


def packed_linear() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 4))
    return layer


LAYERS = {
    "fp8": (fp8, "no adapter fits"),
    "float8 in a plain layer": (lambda: of_another_type(torch.float8_e4m3fn), "stored as torch.float8_e4m3fn"),
    "int8": (lambda: of_another_type(torch.int8), "stored as torch.int8"),
    "uint8": (lambda: of_another_type(torch.uint8), "stored as torch.uint8"),
    "a tensor class": (coded, "stored as Coded"),
    "half the columns": (packed_linear, r"its weight is \(8, 4\), and its sizes are 8 and 8"),
    "no linear layer of torch's": (Packed, "no adapter fits"),
}


@pytest.mark.parametrize(("make", "message"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("names", [["layer"], "all-linear"])
def test_they_are_refused_by_name(make, message, names):
    model = nn.ModuleDict({"layer": make(), "plain": nn.Linear(8, 8)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"layer .*{message}|layer is a .*{message}"):
        lowrank.wrap(model, LoraConfig(target_modules=names, init_lora_weights=False))
    assert lowrank.describe(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_they_are_not_trained_whole():
    model = tiny_llama()
    model.lm_head = fp8()
    with pytest.raises(InputError, match="lm_head is quantised"):
        lowrank.wrap(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
