"""VeRA, with peft as the oracle."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import lowrank
from lowrank.adapters import as_lora, portable
from lowrank.adapters.methods.vera import VeraConfig
from lowrank.errors import InputError
from lowrank.recipes.info import show_info
from lowrank.weights.adapter_info import summarise

IDS = torch.arange(3, 23)[None]
SETTINGS = {
    "all": {"r": 6},
    "other sizes": {"r": 5, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "not saved": {"r": 6, "save_projection": False, "projection_prng_key": 7},
    "layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")


def both(settings):
    """The same base with peft's VeRA at random, saved, and with ours, loaded from there."""
    base = tiny_llama()
    fields = {"target_modules": "all-linear", **settings}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields, init_weights=False)).eval()
    return base, theirs


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
class TestAgainstPeft:
    def test_its_folder_gives_the_same_logits_and_gradients(self, settings, tmp_path):
        base, theirs = both(settings)
        theirs.save_pretrained(tmp_path)
        mine = lowrank.load(copy.deepcopy(base), tmp_path, trainable=True).eval()
        torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
        for model in (mine, theirs):
            model(IDS, labels=IDS).loss.backward()
        wanted = {
            name.removeprefix("base_model.model.").replace(".default", ""): p.grad
            for name, p in theirs.named_parameters()
            if p.requires_grad
        }
        found = {
            name.replace(".adapters.default.", "."): p.grad for name, p in mine.named_parameters() if p.requires_grad
        }
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)

    def test_peft_reads_ours(self, settings, tmp_path):
        base, theirs = both(settings)
        model = lowrank.wrap(copy.deepcopy(base), VeraConfig(**settings, init_weights=False)).eval()
        lowrank.save(model, tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected keyword")
            again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
        assert {name for name, p in again.named_parameters() if "vera" in name} == {
            name for name, p in theirs.named_parameters() if "vera" in name
        }
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert ("base_model.vera_A" in saved) == settings.get("save_projection", True)

    def test_it_merges_in_memory_and_on_disk(self, settings, tmp_path):
        base, theirs = both(settings)
        base.save_pretrained(tmp_path / "base")
        theirs.save_pretrained(tmp_path / "adapter")
        wanted = theirs(IDS).logits
        merged = lowrank.merge(lowrank.load(copy.deepcopy(base), tmp_path / "adapter"))
        torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(on_disk(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(on_disk.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_it_starts_as_pefts():
    base = tiny_llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=4, target_modules="all-linear"))
    mine = lowrank.wrap(copy.deepcopy(base), VeraConfig(r=4))
    assert torch.equal(mine(IDS).logits, base(IDS).logits)
    expected = peft.get_peft_model_state_dict(theirs)
    _, found = portable(mine, "default")
    prefixes = {name: "base_model." if name in ("vera_A", "vera_B") else "base_model.model." for name in found}
    assert expected.keys() == {prefixes[name] + name for name in found}
    assert all(torch.equal(tensor, expected[prefixes[name] + name]) for name, tensor in found.items())


def test_a_conv1d_merges_on_disk(tmp_path):
    """Its weight lies the other way round: blocks of rows are columns of W."""
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    config = VeraConfig(r=4, target_modules=["c_attn", "c_fc"], init_weights=False)
    model = lowrank.wrap(copy.deepcopy(base), config).eval()
    lowrank.save(model, tmp_path / "adapter")
    lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_shared_matrices_stay_one_when_a_model_is_moved():
    model = lowrank.wrap(tiny_llama(), VeraConfig(r=4)).double()
    other = copy.deepcopy(model)
    for one in (model, other):
        layers = [m.adapters["default"] for m in one.modules() if "adapters" in m._modules]
        assert len({layer.shared.vera_A.data_ptr() for layer in layers}) == 1
        assert layers[0].shared.vera_A.dtype == torch.float64
    assert lowrank.describe(model)["default"].parameters == sum(
        4 + m.out_features for m in model.model.modules() if isinstance(m, nn.Linear)
    )


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(InputError, match=r"VeRA fits linear layers, and model\.embed_tokens is none"):
        lowrank.wrap(tiny_llama(), VeraConfig(r=4, target_modules=["embed_tokens"]))


def test_a_file_without_the_matrices_that_it_promises_is_refused(tmp_path):
    model = lowrank.wrap(tiny_llama(), VeraConfig(r=4, save_projection=False))
    lowrank.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    with pytest.raises(InputError, match="missing: vera_A, vera_B"):
        lowrank.load(tiny_llama(), tmp_path)


def test_excluded_modules_which_peft_cannot_say_are_left_out_by_name(tmp_path):
    base = tiny_llama()
    config = VeraConfig(r=4, target_modules=["q_proj", "o_proj"], exclude_modules=["layers.1.self_attn.o_proj"])
    model = lowrank.wrap(copy.deepcopy(base), config.model_copy(update={"init_weights": False})).eval()
    lowrank.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_as_an_ordinary_lora_and_at_half_strength(tmp_path):
    base = tiny_llama()
    model = lowrank.wrap(copy.deepcopy(base), VeraConfig(r=4, init_weights=False, vera_dropout=0.1)).eval()
    lowrank.set_scale(model, "default", 0.5)
    config, _ = as_lora(model, "default")
    assert (config.method_name, config.r, config.lora_dropout) == ("lora", 4, 0.1)
    lowrank.save(model, tmp_path / "vera")
    lowrank.save(model, tmp_path / "lora", as_lora=True)
    for kind in ("vera", "lora"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / kind).eval()
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_biases_train_as_pefts(tmp_path):
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    x = torch.randn(2, 6)
    model = lowrank.wrap(
        copy.deepcopy(net), VeraConfig(r=2, target_modules=["0"], bias="vera_only", init_weights=False)
    )
    with torch.no_grad():
        model[0].adapters["default"].bias += 1.0
    lowrank.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model.eval()(x), atol=1e-5, rtol=1e-5)


def test_a_config_trains_it_and_info_shows_it(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the old tree", "completion": "sings of the river"}\n' * 8)
    sections = {
        "model": {"name_or_path": str(tmp_path / "base"), "device": "cpu"},
        "adapter": {"method": "vera", "r": 8},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 6, "learning_rate": 0.1, "report_to": "none"},
    }
    result = lowrank.train(sections)
    show_info(result.output_dir)
    assert "vera, projection_prng_key 0, bias none" in capsys.readouterr().out
    summary = summarise(result.output_dir)
    assert summary.ranks == {8: sum(summary.modules.values())}
    assert summary.norms == {}  # what of the shared matrices a module takes is the base's to say
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), result.output_dir)
    mine = lowrank.load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), result.output_dir)
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("kind") == "step"]
    assert losses[-1] < losses[0]
