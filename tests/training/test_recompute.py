"""Recomputing activations changes no bit; the selective way keeps less than all and multiplies less than the full."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import tiny_gemma2, tiny_gpt2, tiny_llama, tiny_qwen2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank.adapters import LoraConfig, wrap
from lowrank.attention import segments, set_attention
from lowrank.training.transforms.recompute import recompute_activations
from lowrank.training.transforms.selective import selective_contexts

SELECTIVE = {"use_reentrant": False, "context_fn": selective_contexts, "early_stop": False}
PRODUCTS = ("aten.mm", "aten.addmm", "aten._scaled_dot_product")
MODELS = {"llama": tiny_llama, "gemma2": tiny_gemma2, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith(PRODUCTS))


def adapted(make, attention: str = "segments", **changes: Any) -> Any:
    model = wrap(make(), LoraConfig(r=4, target_modules="all-linear", **changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    set_attention(model, attention, packing=attention == "segments")
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)  # DoRA notes its weights' norms
    return model.train()


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss of a pack, its gradients, and how many products they took."""
    torch.manual_seed(7)
    ids = torch.arange(3, 43)[None]
    positions = torch.cat([torch.arange(16), torch.arange(24)])[None]
    model.zero_grad()
    counting = Counting()
    with segments(model, [16, 24]), counting:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, counting.products


def same(one: tuple, other: tuple) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes_and_products_are_kept(name, dora):
    changes = {"lora_dropout": 0.1, "use_dora": dora}
    plain = step(adapted(MODELS[name], **changes))
    results = {}
    for mode in (True, "selective"):
        model = adapted(MODELS[name], **changes)
        recompute_activations(model, mode)
        results[mode] = step(model)
        same(results[mode], plain)
    again = {mode: result[2] - plain[2] for mode, result in results.items()}
    assert again["selective"] < 0.25 * again[True]  # gradients of the first layer's input, which nobody asked for


def held_after_forward(model: Any) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    ids = torch.arange(64)[None] % 300
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_less_is_kept_than_all_and_more_than_inputs():
    held = {}
    for mode in (False, "selective", True):
        model = adapted(lambda: tiny_llama(intermediate_size=96).bfloat16(), "sdpa")
        if mode:
            recompute_activations(model, mode)
        held[mode] = held_after_forward(model)
    assert held[True] < held["selective"] < 0.75 * held[False]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention(attention):
    plain = step(adapted(tiny_llama, attention))
    model = adapted(tiny_llama, attention)
    recompute_activations(model, "selective")
    same(step(model), plain)


def test_every_weight():
    model = tiny_llama().train()
    plain = step(model)
    recompute_activations(model, "selective")
    same(step(model), plain)


def test_a_product_that_is_read_and_then_changed_is_refused():
    weight = torch.ones(3, 3, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        z = y.exp()
        return z + y.add_(1.0)

    with pytest.raises(RuntimeError, match="cannot be computed again"):
        checkpoint(layer, torch.ones(2, 3), **SELECTIVE)


def test_a_product_that_is_changed_at_once_is_kept_as_it_was_left():
    weight = torch.full((3, 3), 0.5, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        y += 1.0
        return (y.exp() * y).sum()

    gradients = []
    for call in (layer, lambda x: checkpoint(layer, x, **SELECTIVE)):
        weight.grad = None
        call(torch.ones(2, 3)).backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert torch.equal(gradients[0], gradients[1])
