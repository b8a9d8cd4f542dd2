"""Optimisers and their parameter groups, against peft's and torch's own."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from tiny import tiny_llama

import lowrank
from lowrank.errors import InputError
from lowrank.training.checkpoints.snapshot import load_optimizer_state, optimizer_state
from lowrank.training.checkpoints.state import read_state, write_state
from lowrank.training.optimisers.build import build_optimizer, parameter_groups
from lowrank.training.optimisers.muon import for_muon
from lowrank.training.optimisers.settings import GroupRule, OptimizerSettings
from lowrank.training.optimisers.table import OPTIMIZERS

ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]


def wrapped(**options):
    torch.manual_seed(0)
    given = {"r": 4, "target_modules": ["q_proj", "embed_tokens", "up_proj"], **options}
    return lowrank.wrap(tiny_llama(), lowrank.LoraConfig(**given))


def rates(groups) -> dict[int, tuple[float, float]]:
    return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_loraplus_divides_as_peft_does():
    settings = OptimizerSettings(1e-3, weight_decay=0.1, loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-5)
    mine = wrapped()
    found = rates(parameter_groups(mine, settings))
    by_name = {name: found[id(p)] for name, p in mine.named_parameters() if p.requires_grad}

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "up_proj"])
    theirs = peft.get_peft_model(tiny_llama(), config)
    options = {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5, "loraplus_weight_decay": 0.1}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, **options)
    expected = rates(optimizer.param_groups)
    names = {id(p): name for name, p in theirs.named_parameters()}
    translated = {
        names[key]
        .removeprefix("base_model.model.")
        .replace("lora_embedding_", "lora_")
        .replace(".weight", "")
        .replace(".lora_A.default", ".adapters.default.lora_A")
        .replace(".lora_B.default", ".adapters.default.lora_B"): value
        for key, value in expected.items()
    }
    assert by_name == translated


def test_weight_decay_is_for_matrices():
    model = wrapped(use_dora=True, bias="lora_only", target_modules=["q_proj"])
    found = rates(parameter_groups(model, OptimizerSettings(1e-3, weight_decay=0.1)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert found[id(parameter)] == (1e-3, 0.1 if parameter.ndim == 2 else 0.0), name


def test_rules_stand_first():
    rules = [GroupRule(r"layers\.0.*lora_B", learning_rate=5e-3), GroupRule("lora_B", weight_decay=0.0)]
    model = wrapped(target_modules=["q_proj"])
    groups = parameter_groups(model, OptimizerSettings(1e-3, weight_decay=0.1, rules=rules))
    found = rates(groups)
    by_name = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert by_name["model.layers.0.self_attn.q_proj.adapters.default.lora_B"] == (5e-3, 0.1)
    assert by_name["model.layers.1.self_attn.q_proj.adapters.default.lora_B"] == (1e-3, 0.0)
    assert by_name["model.layers.1.self_attn.q_proj.adapters.default.lora_A"] == (1e-3, 0.1)
    assert groups[0]["lr"] == 1e-3  # what the progress bar shows
    with pytest.raises(InputError, match="'k_proj'"):
        parameter_groups(model, OptimizerSettings(1e-3, rules=[GroupRule("k_proj")]))


def train(model, optimizer, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    losses = []
    ids = torch.randint(3, 300, (2, 12))
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def wide():
    """Wide enough that bitsandbytes keeps 8-bit states (from 4,096 values on)."""
    torch.manual_seed(0)
    return lowrank.wrap(
        tiny_llama(hidden_size=256, num_attention_heads=4), lowrank.LoraConfig(r=16, target_modules=["q_proj"])
    )


@pytest.mark.parametrize("name", ON_CPU)
def test_each_learns_and_its_state_survives_a_checkpoint(name, tmp_path):
    settings = OptimizerSettings(learning_rate={"sgd": 1.0, "adafactor": 0.05}.get(name, 3e-3), weight_decay=0.01)
    straight = wide()
    optimizer = build_optimizer(straight, settings, name)
    losses = train(straight, optimizer, 12, seed=1)
    assert losses[-1] < losses[0]

    first = wide()
    halfway = build_optimizer(first, settings, name)
    train(first, halfway, 6, seed=1)
    write_state(tmp_path, {"model": dict(first.state_dict()), "optimizer": optimizer_state(first, halfway)})
    saved = read_state(tmp_path)
    second = wide()
    second.load_state_dict(saved["model"])
    resumed = build_optimizer(second, settings, name)
    load_optimizer_state(second, resumed, saved["optimizer"])
    assert train(second, resumed, 6, seed=1) == losses[6:]
    for (path, found), expected in zip(second.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(found, expected), path


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("paged")])
def test_what_cannot_page_here_is_refused(name):
    with pytest.raises(InputError, match="this run is on the CPU"):
        build_optimizer(wide(), OptimizerSettings(1e-3), name)


def test_muon_leaves_vectors_embeddings_and_head_to_adamw():
    model = wrapped(use_dora=True, target_modules=["q_proj", "embed_tokens", "lm_head"])
    matrices, rest = for_muon(model, parameter_groups(model, OptimizerSettings(1e-3)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    to_muon = {names[id(p)] for group in matrices for p in group["params"]}
    to_adamw = {names[id(p)] for group in rest for p in group["params"]}
    assert to_muon
    assert all("q_proj" in name and "lora_" in name and "magnitude" not in name for name in to_muon)
    assert to_muon | to_adamw == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not to_muon & to_adamw


def test_muon_beside_adamw_is_each_of_them_alone():
    together = wrapped(use_dora=True, target_modules=["q_proj"])
    apart = wrapped(use_dora=True, target_modules=["q_proj"])
    apart.load_state_dict(together.state_dict())
    settings = OptimizerSettings(1e-2, weight_decay=0.1)
    both = build_optimizer(together, settings, "muon")
    matrices, rest = for_muon(apart, parameter_groups(apart, settings))
    alone = [
        torch.optim.Muon(matrices, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.999), fused=True),
    ]
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        for group in [*both.param_groups, *(group for part in alone for group in part.param_groups)]:
            group["lr"] = 1e-2 / (step + 1)  # a schedule's
        for model, optimizers in ((together, [both]), (apart, alone)):
            model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for (name, found), expected in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_muon_refuses_a_model_without_matrices_for_it():
    with pytest.raises(InputError, match="none of them trains"):
        build_optimizer(wrapped(target_modules=["embed_tokens"]), OptimizerSettings(1e-3), "muon")


def test_an_unknown_one_is_refused():
    with pytest.raises(InputError, match="no optimiser 'adam'"):
        build_optimizer(wide(), OptimizerSettings(1e-3), "adam")
