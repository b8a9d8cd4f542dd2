"""The longest batch is tried before the run, and a lack of memory is told with what would help."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_llama
from torch import nn

import lowrank
from lowrank.attention import set_attention
from lowrank.data import Example, Examples, plan_batches
from lowrank.errors import InputError, JobError
from lowrank.training.losses.supervised import supervised_loss
from lowrank.training.machine.shortage import told_when_short
from lowrank.training.reach import unreached
from lowrank.training.rehearsal import rehearse, rehearse_evaluation

LENGTHS = [5, 40, 12, 31, 7, 22]


def plan_of(packing: bool):
    examples = Examples.of([Example(list(range(3, 3 + n)), [False] + [True] * (n - 1)) for n in LENGTHS], "all")
    return plan_batches(
        examples, packing=packing, batch_size=2, max_tokens=48 if packing else None, pad_token_id=0, seed=3
    )


@pytest.mark.parametrize(("packing", "tokens"), [(True, 48), (False, 80)])
def test_it_takes_the_longest_and_leaves_no_trace(packing, tokens):
    torch.manual_seed(0)
    model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))
    set_attention(model, "segments" if packing else "sdpa", packing=packing)
    loss, plan = supervised_loss(model), plan_of(packing)
    seen, weights = [], {name: p.detach().clone() for name, p in model.named_parameters()}
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    before = torch.get_rng_state()
    rehearse(model, plan, loss, Accelerator(cpu=True))
    rehearse_evaluation(model, plan, loss)
    sizes = [plan.batch(indices).input_ids.numel() for indices in plan.epoch(0)]
    assert seen == [max(sizes)] * 2
    assert max(sizes) <= tokens
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_lack_of_memory_is_told_with_what_would_help():
    with (
        pytest.raises(JobError, match=r"out of memory while training.*\n.*smaller packs; 4 bits\."),
        told_when_short(torch.device("cpu"), "training", ["smaller packs", "4 bits"]),
    ):
        torch.empty(2**55, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="must match") as raised, told_when_short(torch.device("cpu"), "", []):
        torch.ones(2) + torch.ones(3)
    assert not isinstance(raised.value, JobError)


def test_tensors_that_no_gradient_reaches_are_named(monkeypatch):
    """Code that changes after wrap is read by nobody: the first backward pass tells."""
    model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4))
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, x: self.up_proj(x) @ self.down_proj.weight.t())
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj.*get no gradient") as raised:
        rehearse(model, plan_of(False), supervised_loss(model), Accelerator(cpu=True))
    assert "down_proj" in str(raised.value)
    assert "up_proj" not in str(raised.value)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_training_drops_by_chance_is_reached_without_chance(monkeypatch):
    model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4, target_modules=["up_proj"]))
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: x * 0 if self.training else forward(self, x))
    rehearse(model, plan_of(False), supervised_loss(model), Accelerator(cpu=True))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        for each in chosen:
            x = self.experts[each](x)
        return x


def test_an_expert_that_no_token_came_to_is_no_fault():
    model = lowrank.wrap(Experts(), lowrank.LoraConfig(r=2))
    model(torch.randn(2, 4), [1]).sum().backward()
    assert unreached(model) == []
    model.zero_grad()
    assert len(unreached(model)) == 6
