from __future__ import annotations

import copy

import peft
import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors, portable
from lowrank.errors import InputError

IDS = torch.arange(3, 23)[None]
STARTING = ["pissa", "pissa_niter_8", "olora"]


def nudge(model):
    """Moves every trainable value, as a training step would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)


def load_tensors(model, tensors):
    for name, tensor in adapter_tensors(model, "default").items():
        tensor.copy_(tensors[name])


@pytest.mark.parametrize("how", [*STARTING, True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_adapted_model_starts_as_the_base(make, how):
    model = make()
    base = model(IDS).logits
    lowrank.wrap(model, LoraConfig(r=4, init_lora_weights=how))
    torch.testing.assert_close(model(IDS).logits, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("how", STARTING)
def test_saves_as_an_ordinary_lora_of_twice_the_rank_on_the_untouched_base(how, rslora):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    lowrank.wrap(
        model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=how, use_rslora=rslora, rank_pattern={"q_proj": 2})
    )
    nudge(model)
    trained = model(IDS).logits
    config, tensors = portable(model, "default")
    assert (config.r, config.rank_pattern, config.init_lora_weights) == (8, {"q_proj": 4}, True)
    lowrank.unwrap(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lowrank.wrap(model, config)
    load_tensors(model, tensors)
    torch.testing.assert_close(model(IDS).logits, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_start_is_pefts(how):
    """Same base, same factors moved by the same amount: the same model, although peft changes the base for it."""
    mine, theirs = tiny_llama(), tiny_llama()
    lowrank.wrap(mine, LoraConfig(r=4, init_lora_weights=how))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, init_lora_weights=how, target_modules="all-linear"))
    expected = peft.get_peft_model_state_dict(wrapped)
    for name, tensor in adapter_tensors(mine, "default").items():
        torch.testing.assert_close(tensor.abs(), expected[f"base_model.model.{name}"].abs(), atol=1e-4, rtol=1e-4)


def test_orthogonal_factors_cancel_and_are_not_zero():
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=4, init_lora_weights="orthogonal"))
    layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert layer.lora_A.norm() > 0.1
    assert layer.lora_B.norm() > 0.1
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, torch.zeros(32, 32), atol=1e-6, rtol=0)


def test_orthogonal_refuses_an_odd_rank_and_leaves_the_model_as_it_was():
    model = tiny_llama()
    names = list(model.state_dict())
    with pytest.raises(InputError, match="even rank, and r is 3"):
        lowrank.wrap(model, LoraConfig(r=3, init_lora_weights="orthogonal"))
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("how", STARTING)
@pytest.mark.parametrize("out_features", [1, 2])
def test_a_rank_above_a_weights_directions_is_refused(how, out_features):
    """One direction alone would be repeated, not refused, by a copy that spreads over rows."""
    model = nn.Sequential(nn.Linear(8, out_features))
    with pytest.raises(InputError, match=f"takes 4 directions of a weight, and one of shape .{out_features}, 8. has"):
        lowrank.wrap(model, LoraConfig(r=4, init_lora_weights=how))
    assert lowrank.describe(model) == {}


class TestEva:
    def test_a_spans_the_inputs_leading_directions_and_ranks_keep_their_sum(self):
        model = tiny_llama()
        seen = []
        target = model.model.layers[1].mlp.down_proj
        handle = target.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
        batches = [{"input_ids": torch.randint(3, 300, (4, 16))} for _ in range(3)]
        for batch in batches:
            model(**batch)
        handle.remove()
        base = model(IDS).logits
        lowrank.wrap(model, LoraConfig(r=4, init_lora_weights="eva", eva_config={"rho": 1.0}), batches=batches)
        A = target.adapters["default"].lora_A
        _, _, directions = torch.linalg.svd(torch.cat(seen), full_matrices=False)
        captured = (A @ directions[:4].t()).square().sum() / 4  # 1 where the two spans are one
        assert captured > 0.9
        assert torch.equal(model(IDS).logits, base)

    def test_ranks_go_to_the_modules_that_need_them(self):
        model = tiny_llama()
        batches = [{"input_ids": torch.randint(3, 300, (4, 16))}]
        lowrank.wrap(model, LoraConfig(r=4, init_lora_weights="eva"), batches=batches)
        ranks = [a["default"].lora_A.shape[0] for m in model.modules() if (a := m._modules.get("adapters")) is not None]
        assert len(set(ranks)) > 1
        assert max(ranks) <= 8
        scales = {a["default"].scale for m in model.modules() if (a := m._modules.get("adapters")) is not None}
        assert scales == {2.0}  # alpha 8 / r 4, whatever the rank became

    @pytest.mark.parametrize("rslora", [False, True])
    def test_the_scale_is_the_one_asked_for_whatever_the_rank_became(self, rslora):
        fields = {"r": 4, "use_rslora": rslora, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}}
        torch.manual_seed(0)
        batches = [{"input_ids": torch.randint(3, 300, (4, 16))}]
        plain, model = lowrank.wrap(tiny_llama(), LoraConfig(**fields)), tiny_llama()
        lowrank.wrap(model, LoraConfig(init_lora_weights="eva", **fields), batches=batches)
        ranks = set()
        for path in lowrank.describe(model)["default"].modules:
            layer, asked = (m.get_submodule(path).adapters["default"] for m in (model, plain))
            ranks.add(layer.lora_A.shape[0])
            assert layer.scale == pytest.approx(asked.scale), path
        assert len(ranks) > 1

    def test_inputs_with_fewer_directions_than_ranks_are_refused(self):
        with pytest.raises(InputError, match="found 14 directions in the inputs, for 56 ranks"):
            lowrank.wrap(
                tiny_llama(), LoraConfig(r=4, init_lora_weights="eva"), batches=[{"input_ids": torch.tensor([[5]])}]
            )

    def test_needs_batches(self):
        with pytest.raises(InputError, match="eva needs `batches`"):
            lowrank.wrap(tiny_llama(), LoraConfig(init_lora_weights="eva"))
        with pytest.raises(InputError, match="eva saw no input"):
            lowrank.wrap(tiny_llama(), LoraConfig(init_lora_weights="eva"), batches=[])
