"""A training step of a tiny model through the calls that a run makes, on the pretended card or on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pretended import Card, on_card, on_host
from tiny import VOCAB

from lowrank.adapters import wrap
from lowrank.attention import check_packing, set_attention
from lowrank.data import Example, Examples, plan_batches
from lowrank.recipes.parts.companion import companions
from lowrank.training import Callback, Run, build_optimizer, fit, lean_norms, supervised_loss
from lowrank.training.losses.supervised import Autocast
from lowrank.training.optimisers.settings import OptimizerSettings
from lowrank.training.steps import StepSize
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.recompute import recompute_activations
from lowrank.training.transforms.shared_inputs import share_inputs

LENGTHS = 20, 9, 14, 31, 17, 40, 12, 5, 25, 22
STEPS = 3


@dataclass
class Seen(Callback):
    """What came of a run; `launches`, `waits`, `operations` and `pageable` are those of its last step.

    Attributes:
        gradients: Of the first step.
    """

    card: Card | None
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    attention: str = ""

    def on_gradients(self, run: Run) -> None:
        if not self.gradients:
            with_grad = ((name, p.grad) for name, p in run.model.named_parameters() if p.grad is not None)
            self.gradients = {name: on_host(grad).float().clone() for name, grad in with_grad}

    def on_step_end(self, run: Run, metrics: Any) -> None:
        self.losses.append(metrics.loss)
        if self.card is not None:
            self.launches, self.waits, self.operations = self.card.launches, self.card.waits, self.card.operations
            self.pageable = self.card.pageable
            self.card.clear()

    def apart(self, other: Seen) -> float:
        """Norm of the difference of the gradients, as a part of the other's."""
        assert self.gradients.keys() == other.gradients.keys()
        off = sum(float((self.gradients[name] - grad).norm()) ** 2 for name, grad in other.gradients.items())
        return (off / sum(float(grad.norm()) ** 2 for grad in other.gradients.values())) ** 0.5


def trained(
    model: Any, config: Any, card: Card | None, *, packing: bool = True, recompute: Any = False, full: bool = False
) -> Seen:
    """A few steps of two batches each.

    Args:
        model: A base, on the CPU; it is used up.
        config: Of the adapter.
        card: None for the CPU.
        packing: Packs, not padded rows.
        recompute: As `training.gradient_checkpointing`.
        full: Every weight trains, in float32, with products in bfloat16; there is no adapter.
    """
    dtype = model.dtype
    with card or nullcontext():
        if card is not None:
            on_card(model)
        torch.manual_seed(1)
        _put_in(model, config, full)
        lean_norms(model)
        if not recompute:
            keep_less(model)
        if not full:
            share_inputs(model)
        seen = Seen(card, attention=set_attention(model, "auto", packing=packing).backend)
        if packing:
            check_packing(model)
        if recompute:
            recompute_activations(model, recompute)
        loss = supervised_loss(model)
        _fit(model, Autocast(loss, torch.bfloat16) if full else loss, seen, packing, dtype)
        assert card is None or all(p.is_cuda for p in model.parameters())
    return seen


def _put_in(model: Any, config: Any, full: bool) -> None:
    if full:
        model.requires_grad_(True)
        return
    wrap(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and config.init_lora_weights is True:
            with torch.no_grad():
                parameter.normal_(0.0, 0.1)


def _fit(model: Any, loss: Any, seen: Seen, packing: bool, dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCAB, (n,), generator=numbers).tolist() for n in LENGTHS]
    examples = Examples.of([Example(row, [False] + [True] * (len(row) - 1)) for row in rows], "all")
    plan = plan_batches(examples, packing=packing, batch_size=2, max_tokens=48, pad_token_id=0, seed=3)
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    on = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(on, init_scale=256.0, enabled=dtype == torch.float16)
    also = companions(model, STEPS)
    run = Run(model, optimizer, schedule, scaler, Path(), STEPS, callbacks=[*also, seen])
    if seen.card is not None:
        seen.card.clear()
    torch.manual_seed(2)
    penalty = also[0].penalty if also else None
    fit(run, plan, loss, accelerator=SimpleNamespace(backward=torch.Tensor.backward), size=StepSize(2), penalty=penalty)
