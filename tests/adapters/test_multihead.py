"""torch's MultiheadAttention against peft, alone and inside torch's own encoder, whose fast path must not pass it by."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters import adapter_tensors
from lowrank.errors import InputError

PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, **options: object) -> torch.Tensor:
        return self.fc(self.attn(x, x, x, **options)[0])


def adapted(base: nn.Module, targets: list[str] | str, **fields: object) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **fields)
    model = lowrank.wrap(copy.deepcopy(base), config)
    for tensor in adapter_tensors(model, "default").values():
        tensor += 0.3 * torch.randn_like(tensor)
    return model


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "zero attn": {"add_zero_attn": True, "add_bias_kv": True},
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_files_are_pefts(options, train, grad, tmp_path):
    torch.manual_seed(0)
    base = Net(**OPTIONS[options]).train(train)
    model = adapted(base, ["attn", "fc"], use_rslora=train, bias="lora_only")
    x = torch.randn(3, 5, 8)
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).train(train)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        assert (expected - base(x)).abs().max() > 0.1
        torch.testing.assert_close(theirs(x), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs").train(train)
    torch.testing.assert_close(back(x), expected, atol=1e-5, rtol=0)
    names = {PREFIX + name for name in adapter_tensors(model, "default")}
    assert names == set(peft.get_peft_model_state_dict(theirs))
    with lowrank.disabled(model):
        torch.testing.assert_close(model(x), base(x), atol=1e-6, rtol=1e-5)
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_gradients_are_those_of_what_acts():
    """By differences in float64. peft's are half of this for `out_proj`: it adds one of its two ΔW past autograd."""
    torch.manual_seed(0)
    model = adapted(Net(batch_first=True).double(), ["attn"], bias="lora_only")
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    loss = model(x).sin().sum()
    loss.backward()
    with torch.no_grad():
        for name, tensor in adapter_tensors(model, "default").items():
            layer = model.attn.adapters["default"]
            gradient = {n: p for p in layer.parameters() for n, t in [(p.data_ptr(), p)]}[tensor.data_ptr()].grad
            direction = torch.randn_like(tensor)
            tensor += 1e-6 * direction
            up = model(x).sin().sum()
            tensor -= 2e-6 * direction
            down = model(x).sin().sum()
            tensor += 1e-6 * direction
            torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-6, atol=1e-7, msg=name)


def test_several_adapters_add_and_merge():
    torch.manual_seed(0)
    base = Net(batch_first=True).eval()
    model = adapted(base, ["attn"], bias="lora_only")
    lowrank.wrap(model, LoraConfig(r=3, target_modules=["attn"], init_lora_weights=False), "other")
    lowrank.set_active(model, ["default", "other"])
    x = torch.randn(3, 5, 8)
    expected = model(x)
    weight = base.attn.in_proj_weight + sum(
        layer.scale * layer.lora_B @ layer.lora_A
        for layer in (model.attn.adapters[name].in_proj for name in ("default", "other"))
    )
    torch.testing.assert_close(lowrank.merge(model)(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.attn.in_proj_weight, weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["self_attn", "linear1", "linear2"]])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_inside_of_torchs_encoder(targets, grad, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = adapted(base, targets)
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None] if padded else None
    with torch.set_grad_enabled(grad):
        got = model(x, src_key_padding_mask=mask)
        model.train()
        slow = model(x, src_key_padding_mask=mask)
        model.eval()
        kept = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
        torch.testing.assert_close(got[kept], slow[kept], atol=1e-5, rtol=1e-5)
        assert (got - base(x, src_key_padding_mask=mask)).abs().max() > 0.05
        merged = lowrank.merge(copy.deepcopy(model))(x, src_key_padding_mask=mask)
        torch.testing.assert_close(merged[kept], got[kept], atol=1e-5, rtol=1e-5)
    assert lowrank.unwrap(model).use_nested_tensor == base.use_nested_tensor
    assert torch.equal(model(x, src_key_padding_mask=mask), base(x, src_key_padding_mask=mask))


def test_cross_attention_masks_and_weights():
    torch.manual_seed(0)
    base = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1).eval()
    model = adapted(base, ["multihead_attn", "self_attn"])
    memory, target = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    expected = model(target, memory, tgt_mask=mask)
    assert (expected - base(target, memory, tgt_mask=mask)).abs().max() > 0.05
    torch.testing.assert_close(lowrank.merge(model)(target, memory, tgt_mask=mask), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    base = Net(batch_first=True).eval()
    model = adapted(base, ["attn"])
    x = torch.randn(3, 5, 8)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.05, rtol=0.05)
    half = adapted(base.bfloat16(), ["attn"])
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    refused = [
        (Net(kdim=4), LoraConfig(target_modules=["attn"]), "another width"),
        (Net(), LoraConfig(target_modules=["attn"], use_dora=True), "method: dora"),
        (Net(), LoraConfig(target_modules=["attn"], lora_bias=True), "lora_bias: True"),
        (Net(), LoraConfig(target_modules=["attn"], init_lora_weights="pissa"), "init_lora_weights: pissa"),
        (Net(), AdaLoraConfig(target_modules=["attn"]), "method: adalora"),
        (Net(), LoraConfig(target_modules=["out_proj"]), "would act on nothing"),
    ]
    for base, config, message in refused:
        with pytest.raises(InputError, match=message):
            lowrank.wrap(base, config)
        assert lowrank.describe(base) == {}


def test_bias_all_trains_the_rest_and_the_outputs_bias():
    torch.manual_seed(0)
    model = adapted(Net(batch_first=True), ["attn"], bias="all")
    names = {name for name in adapter_tensors(model, "default") if "bias" in name}
    assert names == {"attn.base_layer.out_proj.base_layer.bias", "fc.bias"}
    x = torch.randn(3, 5, 8)
    expected = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), expected, atol=1e-5, rtol=1e-5)
    assert lowrank.wrap(Net(), LoraConfig()).attn._modules.keys() == {"out_proj"}  # all-linear: fc alone


def test_rows_are_not_routed():
    model = adapted(Net(batch_first=True), ["attn"])
    with pytest.raises(InputError, match="rout"), lowrank.routed(model, ["default", None]):
        model(torch.randn(2, 5, 8))
