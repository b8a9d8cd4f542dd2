"""Muon for the matrices between a model's embeddings and its head, AdamW for all else, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Groups = list[dict[str, Any]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan 2024) and AdamW side by side: one list of groups, one state, one `state_dict`.

    Muon's updates are scaled so that AdamW's learning rates fit (Liu 2025): one learning rate serves both.

    Args:
        matrices: Groups for Muon, one at least; all their parameters have two dimensions.
        rest: Groups for AdamW.
        betas: AdamW's; the first is Muon's momentum.
        epsilon: AdamW's.
    """

    def __init__(self, matrices: Groups, rest: Groups, betas: tuple[float, float], epsilon: float) -> None:
        muon = torch.optim.Muon(matrices, momentum=betas[0], adjust_lr_fn="match_rms_adamw")
        self._parts: list[torch.optim.Optimizer] = [muon]
        if rest:
            self._parts.append(torch.optim.AdamW(rest, betas=betas, eps=epsilon, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets the two work on this one's groups, whose learning rates a schedule sets, and keep their state in it."""
        left = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(left) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore [bad-override]
        """One step of each."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss


def for_muon(model: nn.Module, groups: Groups) -> tuple[Groups, Groups]:
    """Groups cut in two: matrices, and what Muon is not for.

    That is vectors and convolutions, and what belongs to embeddings and to the head, adapters on them included: each
    of their rows is a token, and few tokens have a gradient in a step.
    """
    ends = {id(parameter) for module in _ends(model) for parameter in module.parameters()}
    matrices, rest = [], []
    for group in groups:
        fit = [p for p in group["params"] if p.ndim == 2 and id(p) not in ends]
        others = [p for p in group["params"] if p.ndim != 2 or id(p) in ends]
        matrices += [{**group, "params": fit}] if fit else []
        rest += [{**group, "params": others}] if others else []
    return matrices, rest


def _ends(model: nn.Module) -> list[nn.Module]:
    """Every embedding, and the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return found if head is None else [*found, head]
