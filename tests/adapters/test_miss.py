"""MiSS against peft: outputs, gradients, folders both ways, merges; a run from a config, resumed; what is refused."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import peft
import pytest
import torch
import yaml
from architectures import MODELS, output
from safetensors.torch import load_file
from short_run import base, write_config
from transformers import AutoModelForCausalLM

import lowrank
from lowrank.adapters import adapter_tensors
from lowrank.adapters.methods.miss import MissConfig
from lowrank.cli import main
from lowrank.errors import InputError
from lowrank.recipes.info import show_info
from lowrank.training.run import Callback
from lowrank.weights import export

__all__ = ["base", "write_config"]

PREFIX = "base_model.model."
ADAPTER = "adapter_model.safetensors"
IDS = torch.arange(3, 23)[None]
FORMS = {
    "zeros": {"r": 8},
    "r-that-leaves-a-rest": {"r": 5},  # 32 and 48 inputs
    "random": {"r": 4, "init_weights": False},
    "mini": {"r": 8, "init_weights": "mini", "mini_r": 4},
}


def filled(model, seed: int = 1):
    """The adapter's weights, random, put into the model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = adapter_tensors(model, "default")
    given = {key: 0.1 * torch.randn(each.shape, generator=generator) for key, each in sorted(tensors.items())}
    for key, tensor in tensors.items():
        tensor.copy_(given[key])
    return given


def pair(name: str, fields: dict):
    """The same adapter with the same random weights on two copies of a model: ours and peft's."""
    mine = MODELS[name]()
    theirs = copy.deepcopy(mine)
    lowrank.wrap(mine, MissConfig(**fields))
    modules = list(lowrank.describe(mine)["default"].modules)
    wrapped = peft.get_peft_model(theirs, peft.MissConfig(**fields, target_modules=modules))
    given = filled(mine)
    assert set(given) == {key.removeprefix(PREFIX) for key in peft.get_peft_model_state_dict(wrapped)}
    peft.set_peft_model_state_dict(wrapped, {PREFIX + key: tensor for key, tensor in given.items()})
    return mine, wrapped.eval()


def gradients(model, name: str) -> dict[str, torch.Tensor]:
    out = output(model, name)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).sin()).sum().backward()
    return {
        key.removeprefix(PREFIX).replace(".default", "").replace(".adapters", ""): p.grad
        for key, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe", "opt"])
def test_outputs_and_gradients_and_merged(name, form):
    mine, theirs = pair(name, FORMS[form])
    plain, expected = output(MODELS[name](), name), output(theirs, name)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(output(mine, name), expected, atol=1e-5, rtol=1e-5)
    want, have = gradients(theirs, name), gradients(mine, name)
    assert have.keys() == want.keys()
    for key, grad in have.items():
        size = want[key].abs().max().clamp_min(1e-6)
        torch.testing.assert_close(grad / size, want[key] / size, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(output(lowrank.merge(mine), name), expected, atol=1e-5, rtol=1e-5)


def test_it_starts_as_the_base_and_random_as_peft_draws_it():
    plain = MODELS["llama"]()
    for fields in ({}, {"init_weights": "mini", "mini_r": 8}):
        model = lowrank.wrap(MODELS["llama"](), MissConfig(r=8, **fields))
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model = lowrank.wrap(MODELS["llama"](), MissConfig(r=8, init_weights=False, target_modules=["q_proj"]))
    bound = 1 / 32**0.5  # Kaiming's with a = √5, over D's 32 columns
    spread = [each.abs().max() for each in adapter_tensors(model, "default").values()]
    assert all(0.9 * bound < each <= bound for each in spread)


def test_one_table_of_sums_serves_every_layer():
    model = lowrank.wrap(MODELS["llama"](), MissConfig(r=8))
    layers = [module.adapters["default"] for module in model.modules() if "adapters" in module._modules]
    assert len({layer.shared for layer in layers}) == 1
    assert layers[0].shared.miss_sums.shape == (8, 48)
    assert not any("miss_sums" in key for key in model.state_dict())
    info = lowrank.describe(model)["default"]
    assert info.parameters == info.trainable == sum(layer.miss_block.numel() for layer in layers)


def test_dropout_falls_on_the_inputs_that_are_summed():
    model = lowrank.wrap(MODELS["llama"](), MissConfig(r=5, miss_dropout=0.5, target_modules=["q_proj"]))
    filled(model)
    module = model.model.layers[0].self_attn.q_proj.train()
    x, D = torch.randn(1, 3, 32), module.adapters["default"].miss_block
    torch.manual_seed(5)
    got = module(x) - torch.nn.functional.linear(x, module.weight)
    torch.manual_seed(5)
    keep = torch.empty(3, 32, dtype=torch.bool).bernoulli_(0.5)
    sums = torch.nn.functional.pad(x[0] * keep * 2, (0, 3)).view(3, 7, 5).sum(1)
    torch.testing.assert_close(got[0], sums @ D, atol=1e-5, rtol=1e-5)


def test_several_rows_each_with_its_own():
    model = lowrank.wrap(MODELS["llama"](), MissConfig(r=5), adapter="a")
    lowrank.wrap(model, MissConfig(r=8, init_weights="mini", mini_r=2), adapter="b")
    for name in "ab":
        for tensor in adapter_tensors(model, name).values():
            tensor.normal_(std=0.2)
    rows = IDS.repeat(3, 1)
    with lowrank.routed(model, ["a", "b", None]):
        got = model(rows).logits
    for row, names in zip(got, (["a"], ["b"], []), strict=True):
        with lowrank.using(model, names):
            torch.testing.assert_close(row, model(IDS).logits[0], atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["zeros-none", "r-that-leaves-a-rest-MiSS_only", "mini-all"])
def saved(request, tmp_path) -> tuple[Path, Path, torch.Tensor]:
    """A base with biases on disk, an adapter on it, and what they give together."""
    form, _, bias = request.param.rpartition("-")
    MODELS["qwen2"]().save_pretrained(tmp_path / "base")
    model = lowrank.wrap(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        MissConfig(**FORMS[form], bias=bias, layers_to_transform=1),
    )
    filled(model)
    return tmp_path / "base", lowrank.save(model, tmp_path / "adapter"), model(IDS).logits.detach()


def test_peft_reads_the_folder(saved):
    base, adapter, wanted = saved
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    torch.testing.assert_close(theirs(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_it_reads_pefts_folder(saved, tmp_path):
    base, adapter, wanted = saved
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lowrank.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "theirs")
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    again = lowrank.save(model, tmp_path / "again")
    ours, theirs = (load_file(folder / ADAPTER) for folder in (adapter, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_merged_on_disk(saved, tmp_path):
    base, adapter, wanted = saved
    lowrank.merge_checkpoint(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_as_an_ordinary_lora(saved, tmp_path, factor):
    base, adapter, _ = saved
    model = lowrank.load(AutoModelForCausalLM.from_pretrained(base), adapter)
    lowrank.set_scale(model, "default", factor)
    wanted = model(IDS).logits
    lowrank.save(model, tmp_path / "lora", as_lora=True)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert type(theirs.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(theirs(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    itself = lowrank.save(model, tmp_path / "scaled")
    loaded = lowrank.load(AutoModelForCausalLM.from_pretrained(base), itself)
    torch.testing.assert_close(loaded(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_what_needs_factors_apart_from_the_base_asks_for_a_lora(tmp_path):
    model = lowrank.wrap(MODELS["llama"](), MissConfig(r=8))
    filled(model)
    folder = lowrank.save(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="method miss") as error:
        lowrank.compose([folder, folder], out=tmp_path / "sum")
    assert "as_lora=True" in error.value.fix
    with pytest.raises(InputError, match="vLLM cannot express method miss") as error:
        export(folder, tmp_path / "served", to="vllm")
    assert "as_lora=True" in error.value.fix
    lora = lowrank.save(model, tmp_path / "lora", as_lora=True)
    export(lora, tmp_path / "served", to="vllm")
    served = lowrank.load(MODELS["llama"](), tmp_path / "served")
    torch.testing.assert_close(served(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture
def config(write_config) -> Path:
    """A short run with checkpoints, dropout and accumulation."""
    path = write_config(training={"save_steps": 2, "gradient_accumulation_steps": 2})
    sections = yaml.safe_load(path.read_text())
    sections["adapter"] = {"method": "miss", "r": 8, "miss_dropout": 0.1}
    path.write_text(yaml.safe_dump(sections))
    return path


def test_a_config_trains_it_and_info_shows_it(config, base, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["check", str(config)])
    assert not exited.value.code
    assert "miss, r = 8, on 14 modules" in capsys.readouterr().out
    result = lowrank.train(config)
    assert result.after.loss < 0.95 * result.before.loss
    show_info(result.output_dir)
    shown = capsys.readouterr().out
    assert "miss, bias none" in shown
    assert "8 (14 modules)" in shown
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output_dir)
    mine = lowrank.load(AutoModelForCausalLM.from_pretrained(base), result.output_dir)
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


class Interrupt(Callback):
    """Ctrl-C after a step."""

    def on_step_end(self, run, metrics) -> None:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_and_resumed_it_is_the_same_file(config, tmp_path):
    straight = lowrank.train(config, ["training.output_dir=straight"])
    assert straight.steps >= 4
    assert lowrank.train(config, callbacks=[Interrupt()]).interrupted
    lowrank.train(config, resume=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (straight.output_dir / ADAPTER).read_bytes()


REFUSED = {
    "bat": ({"init_weights": "bat"}, "llama", "no low-rank term"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4}}, "llama", "rank_pattern"),
    "mini_r-alone": ({"mini_r": 4}, "llama", "init_weights is not mini"),
    "mini_r-that-leaves-a-rest": ({"init_weights": "mini", "mini_r": 5}, "llama", "mini_r is 5, which does not divide"),
    "r-above-the-inputs": ({"r": 33}, "llama", "has 32 inputs to sum"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "llama", "fits linear layers, and model.embed_tokens is none"),
    "Conv1D": ({"target_modules": ["c_attn"]}, "gpt2", "is a Conv1D"),
    "attention": ({"target_modules": ["self_attn"]}, "multihead", "MultiheadAttention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_fit_is_refused(case):
    fields, name, told = REFUSED[case]
    model = torch.nn.TransformerEncoderLayer(32, 4) if name == "multihead" else MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises((InputError, ValueError), match=told):
        lowrank.wrap(model, MissConfig(**{"r": 8, **fields}))
    assert lowrank.describe(model) == {}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_pefts_bat_is_refused_when_it_is_read(tmp_path):
    modules = ["q_proj", "v_proj"]
    theirs = peft.get_peft_model(MODELS["llama"](), peft.MissConfig(r=8, init_weights="bat", target_modules=modules))
    theirs.save_pretrained(tmp_path / "bat")
    with pytest.raises(InputError, match="no low-rank term"):
        lowrank.load(MODELS["llama"](), tmp_path / "bat")
