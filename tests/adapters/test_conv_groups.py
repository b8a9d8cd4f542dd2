"""Convolutions of three dimensions, with groups and other paddings, against peft or the plain kernel."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters import adapter_tensors
from lowrank.errors import InputError
from lowrank.weights import adapter_info as info

PREFIX = "base_model.model."
NETS = {
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 2, 3), stride=(1, 2, 1), padding=1), (2, 3, 4, 5, 6)),
    "conv3d-no-bias": (lambda: nn.Conv3d(3, 4, 2, bias=False), (2, 3, 4, 5, 6)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 3, 4, 5)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, bias=False), (2, 4, 7, 6)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 8, 3, padding="same", groups=2), (2, 4, 9)),
    "conv1d-depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
}
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def adapted(layer: nn.Module, **fields: object) -> tuple[nn.Module, nn.Module]:
    """The base, and a copy with an adapter of random values."""
    base = nn.Sequential(layer).eval()
    model = lowrank.wrap(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **fields))
    for tensor in adapter_tensors(model, "default").values():
        tensor += 0.3 * torch.randn_like(tensor)
    return base, model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_outputs_gradients_and_files_are_pefts(name, method, tmp_path):
    torch.manual_seed(0)
    make, shape = NETS[name]
    base, model = adapted(make(), **METHODS[method])
    x = torch.randn(shape)
    expected = model(x)
    assert (expected - base(x)).abs().max() > 0.1
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(x), expected, atol=1e-5, rtol=1e-5)
    for net in (theirs, model):
        (net(x) * torch.linspace(-1, 1, expected.numel()).view_as(expected).sin()).sum().backward()
    wanted = {p.shape: p.grad for p in theirs.parameters() if p.grad is not None}
    layer = model[0].adapters["default"]
    for factor in layer.method.factors:
        _, shaped = layer.kind.in_file(model[0], factor, getattr(layer, factor.name).grad)
        torch.testing.assert_close(shaped, wanted[shaped.shape], atol=1e-4, rtol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(back(x), expected, atol=1e-6, rtol=0)
    assert info.summarise(tmp_path / "theirs").ranks == {4: 1}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["conv3d", "conv3d-no-bias"])
def test_three_dimensions_merge(name, dora):
    torch.manual_seed(0)
    make, shape = NETS[name]
    _, model = adapted(make(), use_dora=dora)
    x = torch.randn(shape)
    expected = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_padding_and_dilation_are_the_modules_own(make, mode, dora):
    """peft pads and spreads A's kernel otherwise than W's, so that its outputs change by merging; here they do not."""
    torch.manual_seed(0)
    layer = make(3, 4, 3, padding=2, dilation=2, padding_mode=mode)
    _, model = adapted(layer, use_dora=dora)
    x = torch.randn(2, 3, *[7] * (layer.weight.ndim - 2))
    expected = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), expected, atol=1e-5, rtol=1e-5)


def test_a_depthwise_term_is_the_kernel_that_mixes_channels():
    torch.manual_seed(0)
    base, model = adapted(NETS["conv2d-depthwise"][0]())
    x = torch.randn(2, 4, 5, 5)
    layer = model[0].adapters["default"]
    B = torch.block_diag(*layer.lora_B.chunk(4))
    kernel = (1.5 * B @ layer.lora_A).view(4, 4, 3, 3)
    torch.testing.assert_close(model(x), base(x) + F.conv2d(x, kernel, padding=1), atol=1e-5, rtol=1e-5)


def test_what_groups_cannot_have_is_refused(tmp_path):
    make, shape = NETS["conv2d-depthwise"]
    base, model = adapted(make())
    x = torch.randn(shape)
    before = model(x)
    with pytest.raises(InputError, match="0 cannot be merged: it is a convolution with 4 groups"):
        lowrank.merge(model)
    torch.testing.assert_close(model(x), before)
    for config in (
        LoraConfig(r=6, target_modules=["0"]),
        LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"),
        AdaLoraConfig(target_modules=["0"]),
    ):
        with pytest.raises(InputError, match="groups"):
            lowrank.wrap(copy.deepcopy(base), config)
    lowrank.save(model, tmp_path / "a")
    with pytest.raises(InputError, match="4 groups"):
        lowrank.compose([tmp_path / "a"], out=tmp_path / "b")


def test_rows_are_routed_and_adapters_add():
    torch.manual_seed(0)
    make, shape = NETS["conv3d-groups"]
    base, model = adapted(make())
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "other")
    x = torch.randn(shape)
    plain = base(x)
    with lowrank.using(model, "default"):
        one = model(x)
    with lowrank.using(model, "other"):
        other = model(x)
    lowrank.set_active(model, ["default", "other"])
    torch.testing.assert_close(model(x), one + other - plain, atol=1e-5, rtol=1e-5)
    with lowrank.routed(model, ["other", None]):
        torch.testing.assert_close(model(x), torch.stack([other[0], plain[1]]), atol=1e-5, rtol=1e-5)
