"""AdaLoRA's training side (Zhang 2023): which ranks matter, and how many are left at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowrank.adapters.methods.method import Holder
from lowrank.errors import InputError


def orthogonality(layers: Sequence[Holder]) -> torch.Tensor:
    """Mean over all P and Q of ‖PᵀP - I‖ and ‖QQᵀ - I‖ (equation 4)."""
    terms = []
    for layer in layers:
        for gram in (layer.lora_A @ layer.lora_A.t(), layer.lora_B.t() @ layer.lora_B):
            terms.append(
                torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype))
            )
    return torch.stack(terms).mean()


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
        for parameter, sensitivity in self._sensitivity.items():
            assert parameter.grad is not None, "step() comes after backward and before the gradients are cleared"
            now = (parameter * parameter.grad).abs()
            sensitivity.lerp_(now, 1.0 - self.config.beta1)
            self._uncertainty[parameter].lerp_((now - sensitivity).abs(), 1.0 - self.config.beta2)

    def _prune(self, budget: int, renew: bool) -> None:
        """Zeroes Λ outside of the `budget` most important triplets (equation 6); once final, the same ones again."""
        if renew:
            importance = torch.cat([self._importance(layer) for layer in self.layers])
            kept = torch.zeros_like(importance, dtype=torch.bool)
            kept[importance.topk(budget).indices] = True
            for layer, mask in zip(self.layers, kept.split([layer.kept.numel() for layer in self.layers]), strict=True):
                layer.kept.copy_(mask)
        for layer in self.layers:
            layer.lora_E.masked_fill_(~layer.kept[:, None], 0.0)

    def _importance(self, layer: Holder) -> torch.Tensor:
        """Of each triplet, (r,): s(λ) + mean s(P column) + mean s(Q row), s = sensitivity · uncertainty (eq. 11)."""
        A, E, B = (self._sensitivity[p] * self._uncertainty[p] for p in (layer.lora_A, layer.lora_E, layer.lora_B))
        return E[:, 0] + A.mean(dim=1) + B.mean(dim=0)

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """The smoothed sensitivities and uncertainties."""
        return {"sensitivity": list(self._sensitivity.values()), "uncertainty": list(self._uncertainty.values())}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Takes up what `state_dict` gave."""
        for table, saved in ((self._sensitivity, "sensitivity"), (self._uncertainty, "uncertainty")):
            for mine, theirs in zip(table.values(), state[saved], strict=True):
                mine.copy_(theirs)
