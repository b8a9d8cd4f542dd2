"""AdaLoRA's training side (Zhang 2023): which ranks matter, and how many are left at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowrank.adapters.methods.method import Holder
from lowrank.errors import InputError


def orthogonality(layers: Sequence[Holder]) -> torch.Tensor:
    """Mean over all P and Q of ‖PᵀP - I‖ and ‖QQᵀ - I‖ (equation 4); those of one shape in one product."""
    rows = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B.t())]  # each (r, width)
    return torch.cat([_apart_from_orthogonal(torch.stack(alike)) for alike in _by_shape(rows)]).mean()


def _apart_from_orthogonal(rows: torch.Tensor) -> torch.Tensor:
    """‖M·Mᵀ - I‖ of each M of (k, r, width), (k,)."""
    grams = rows @ rows.mT
    return torch.linalg.matrix_norm(grams - torch.eye(grams.shape[-1], device=grams.device, dtype=grams.dtype))


def _by_shape(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    alike: dict[torch.Size, list[torch.Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.shape, []).append(tensor)
    return list(alike.values())


class Budget:
    """Shrinks the ranks of one adapter's layers to their budget.

    Call `step` after each optimiser step, before the gradients are cleared. The state is in `state_dict`, so that a
    resumed run goes on with the same importances.

    Args:
        layers: The adapter's.
        config: Its config; `self.config` says how long the run is, without which peft reads no folder.
        total_step: Optimiser steps of the whole run.

    Raises:
        InputError: no step is left in which ranks could shrink.
    """

    def __init__(self, layers: Sequence[Holder], config: Any, total_step: int) -> None:
        if config.tinit + config.tfinal >= total_step:
            raise InputError(
                f"tinit + tfinal ({config.tinit} + {config.tfinal}) leave none of {total_step} steps to shrink ranks",
                fix="Train longer, or lower tinit and tfinal.",
            )
        self.config = config.model_copy(update={"total_step": total_step})
        self.layers, self.total_step = list(layers), total_step
        self.full = sum(layer.lora_A.shape[0] for layer in self.layers)
        self.target = min(self.full, config.target_r * len(self.layers))
        parameters = [p for layer in self.layers for p in (layer.lora_A, layer.lora_E, layer.lora_B)]
        self._sensitivity = {p: torch.zeros_like(p) for p in parameters}
        self._uncertainty = {p: torch.zeros_like(p) for p in parameters}

    def budget(self, step: int) -> int:
        """b(t), the ranks left after optimiser step `step` (from 1), by the cubic schedule (equation 12)."""
        begin, end = self.config.tinit, self.total_step - self.config.tfinal
        if step <= begin:
            return self.full
        if step >= end:
            return self.target
        left = 1.0 - (step - begin) / (end - begin)
        return int((self.full - self.target) * left**3 + self.target)

    def penalty(self) -> torch.Tensor:
        """The orthogonality term of the loss."""
        return self.config.orth_reg_weight * orthogonality(self.layers)

    @torch.no_grad()
    def step(self, step: int) -> int:
        """Updates the importances from the gradients and prunes to the budget where one is due; returns b(t)."""
        end = self.total_step - self.config.tfinal
        if step <= end:
            self._observe()
        budget = self.budget(step)
        if step >= end or (step > self.config.tinit and step % self.config.deltaT == 0):
            self._prune(budget, renew=step <= end)
        return budget

    def _observe(self) -> None:
        """Smoothed sensitivity |w · ∂L/∂w| and its smoothed uncertainty (equations 8 to 10)."""
        parameters = list(self._sensitivity)
        gradients = [parameter.grad for parameter in parameters]
        assert None not in gradients, "step() comes after backward and before the gradients are cleared"
        sensitivity, uncertainty = list(self._sensitivity.values()), list(self._uncertainty.values())
        now = torch._foreach_abs(torch._foreach_mul(parameters, gradients))
        torch._foreach_lerp_(sensitivity, now, 1.0 - self.config.beta1)
        apart = torch._foreach_abs(torch._foreach_sub(now, sensitivity))
        torch._foreach_lerp_(uncertainty, apart, 1.0 - self.config.beta2)

    def _prune(self, budget: int, renew: bool) -> None:
        """Zeroes Λ outside of the `budget` most important triplets (equation 6); once final, the same ones again."""
        masks = [layer.kept for layer in self.layers]
        sizes = [mask.numel() for mask in masks]
        if renew:
            importance = self._importance()
            kept = torch.zeros_like(importance, dtype=torch.bool)
            kept[importance.topk(budget).indices] = True
            torch._foreach_copy_(masks, list(kept.split(sizes)))
        values = [layer.lora_E for layer in self.layers]
        left = torch.cat(values).masked_fill_(~torch.cat(masks)[:, None], 0.0)  # a product would leave NaN as it is
        torch._foreach_copy_(values, list(left.split(sizes)))

    def _importance(self) -> torch.Tensor:
        """Of each triplet, layer by layer: s(λ) + mean s(P column) + mean s(Q row), s = sensitivity · uncertainty
        (equation 11)."""
        scores = torch._foreach_mul(list(self._sensitivity.values()), list(self._uncertainty.values()))
        return torch.cat(scores[1::3])[:, 0] + _means(scores[0::3], 1) + _means(scores[2::3], 0)

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """The smoothed sensitivities and uncertainties."""
        return {"sensitivity": list(self._sensitivity.values()), "uncertainty": list(self._uncertainty.values())}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Takes up what `state_dict` gave."""
        for table, saved in ((self._sensitivity, "sensitivity"), (self._uncertainty, "uncertainty")):
            for mine, theirs in zip(table.values(), state[saved], strict=True):
                mine.copy_(theirs)


def _means(tables: Sequence[torch.Tensor], over: int) -> torch.Tensor:
    """The mean of each row (`over` 1) or column (0) of all tables, one after another; equally long ones at once."""
    other = 1 - over
    means: dict[int, torch.Tensor] = {}
    for length in {table.shape[over] for table in tables}:
        some = [number for number, table in enumerate(tables) if table.shape[over] == length]
        found = torch.cat([tables[number] for number in some], dim=other).mean(dim=over)
        means |= zip(some, found.split([tables[number].shape[other] for number in some]), strict=True)
    return torch.cat([means[number] for number in range(len(tables))])
