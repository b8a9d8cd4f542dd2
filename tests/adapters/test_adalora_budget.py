from __future__ import annotations

import peft
import pytest
import torch
from tiny import tiny_llama

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters import RankBudget, adapter_tensors, as_lora, orthogonality, portable
from lowrank.errors import InputError

IDS = torch.arange(3, 23)[None]
STEPS = 20
CONFIG = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=5, lora_alpha=4, deltaT=3)


def trained(model, config=CONFIG, steps=STEPS):
    """A short AdaLoRA run; returns the budget after each step."""
    lowrank.wrap(model, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    budget = RankBudget(model, "default", steps)
    left = []
    for step in range(1, steps + 1):
        loss = model(IDS, labels=IDS).loss + config.orth_reg_weight * orthogonality(model, "default")
        loss.backward()
        optimizer.step()
        left.append(budget.step(step))
        optimizer.zero_grad()
    model.eval()
    return left


def kept_ranks(model):
    return sum(
        int((a["default"].lora_E != 0).sum()) for m in model.modules() if (a := m._modules.get("adapters")) is not None
    )


def test_ranks_end_at_the_budget():
    model = tiny_llama()
    left = trained(model)
    assert left[:2] == [56, 56]
    assert left[-5:] == [28] * 5
    assert left == sorted(left, reverse=True)
    assert kept_ranks(model) == 28


def test_the_schedule_is_pefts_where_ranks_shrink():
    model = lowrank.wrap(tiny_llama(), CONFIG)
    budget = RankBudget(model, "default", STEPS)
    theirs = peft.get_peft_model(
        tiny_llama(),
        peft.AdaLoraConfig(
            init_r=4, target_r=2, tinit=2, tfinal=5, total_step=STEPS, target_modules=r".*(_proj)", lora_alpha=4
        ),
    )
    allocator = theirs.base_model.rankallocator
    for step in range(1, STEPS + 1):
        assert budget.budget(step) == allocator.budget_schedule(step)[0]


def test_importance_and_orthogonality_are_pefts():
    mine = lowrank.wrap(tiny_llama(), CONFIG)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",  # without it peft leaves the orthogonality term out
        init_r=4,
        target_r=2,
        tinit=0,
        tfinal=5,
        total_step=STEPS,
        target_modules=r".*(_proj)",
        lora_alpha=4,
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    given = {name: torch.randn_like(t) * 0.1 for name, t in adapter_tensors(mine, "default").items()}
    for name, tensor in adapter_tensors(mine, "default").items():
        tensor.copy_(given[name])
    parameters = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in theirs.named_parameters()}
    for name, tensor in given.items():
        parameters[name].data.copy_(tensor)
    expected = theirs(input_ids=IDS, labels=IDS).loss
    loss = mine(IDS, labels=IDS).loss + CONFIG.orth_reg_weight * orthogonality(mine, "default")
    torch.testing.assert_close(loss, expected)
    budget = RankBudget(mine, "default", STEPS)
    for _ in range(3):
        loss.backward(retain_graph=True)
        budget._observe()
        expected.backward(retain_graph=True)
        theirs.base_model.rankallocator.update_ipt(theirs.base_model.model)
    allocator = theirs.base_model.rankallocator
    by_name = {n.removeprefix("model.").replace(".default", ""): n for n in allocator.exp_avg_ipt}
    for path, module in mine.named_modules():
        if "adapters" in module._modules:
            layer = module.adapters["default"]
            for name, parameter in layer.factors().items():
                key = by_name[f"{path.removeprefix('model.')}.{name}"]
                torch.testing.assert_close(budget._sensitivity[parameter], allocator.exp_avg_ipt[key])
                torch.testing.assert_close(budget._uncertainty[parameter], allocator.exp_avg_unc[key])


def test_pruned_it_saves_in_pefts_layout_and_as_an_ordinary_lora():
    model = tiny_llama()
    trained(model)
    expected = model(IDS).logits
    ada, lora = portable(model, "default"), as_lora(model, "default")
    assert sum(map(sum, ada[0].rank_pattern.values())) == 28
    assert isinstance(lora[0], LoraConfig)
    lowrank.unwrap(model)
    for config, tensors in (ada, lora):
        lowrank.wrap(model, config)
        for name, tensor in adapter_tensors(model, "default").items():
            tensor.copy_(tensors[name])
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        again = portable(model, "default")
        assert getattr(again[0], "rank_pattern", None) == config.rank_pattern
        lowrank.unwrap(model)


def test_a_budget_without_room_to_shrink_is_refused():
    model = lowrank.wrap(tiny_llama(), CONFIG)
    with pytest.raises(InputError, match="leave none of 7 steps"):
        RankBudget(model, "default", 7)
    with pytest.raises(ValueError, match="ranks only shrink"):
        AdaLoraConfig(init_r=4, target_r=5)


def test_state_goes_on_where_it_stopped():
    model = lowrank.wrap(tiny_llama(), CONFIG)
    budget = RankBudget(model, "default", STEPS)
    model(IDS, labels=IDS).loss.backward()
    budget.step(1)
    other = RankBudget(model, "default", STEPS)
    other.load_state_dict(budget.state_dict())
    for mine, theirs in zip(other._sensitivity.values(), budget._sensitivity.values(), strict=True):
        assert torch.equal(mine, theirs)
