"""The optimisers: a line each, a name and what makes it. The config reads their names here, so nothing loads torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowrank.errors import InputError
from lowrank.training.optimisers.settings import OptimizerSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lowrank.training.optimisers.muon import Groups

Maker = Callable[["nn.Module", "Groups", OptimizerSettings], "Optimizer"]
"""Makes an optimiser over groups of a model's parameters; it is handed the model too."""


def _adamw(fused: bool) -> Maker:
    """AdamW (Loshchilov 2019)."""

    def make(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> Optimizer:
        from torch.optim import AdamW

        return AdamW(groups, settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=fused)

    return make


def _adafactor(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> Optimizer:
    """Adafactor (Shazeer 2018): the second moment of a matrix from its rows and columns.

    With steps as long as the learning rate says, as transformers' Trainer takes it. Steps in proportion to a weight's
    size, torch's only way, would leave lora_B, which begins at zero, where it is.
    """
    from transformers import Adafactor

    return Adafactor(groups, settings.learning_rate, scale_parameter=False, relative_step=False)


def _sgd(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> Optimizer:
    from torch.optim import SGD

    return SGD(groups, settings.learning_rate)


def _muon(model: nn.Module, groups: Groups, settings: OptimizerSettings) -> Optimizer:
    import torch

    from lowrank.training.optimisers.muon import MuonWithAdamW, for_muon

    if not hasattr(torch.optim, "Muon"):
        raise InputError("this torch has no Muon", where="training.optim", fix="Take torch 2.9 or newer.")
    matrices, rest = for_muon(model, groups)
    if not matrices:
        raise InputError(
            "Muon is for matrices between the embeddings and the head, and none of them trains",
            where="training.optim",
            fix="Take another optimiser.",
        )
    return MuonWithAdamW(matrices, rest, settings.betas, settings.epsilon)


def _bitsandbytes(kind: str, paged: bool = False) -> Maker:
    """An optimiser of bitsandbytes (Dettmers 2021): states in 8 bits, or paged out to the host's memory."""

    def make(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> Optimizer:
        if find_spec("bitsandbytes") is None:
            raise InputError(
                "it needs bitsandbytes, which is not installed",
                where="training.optim",
                fix="Install it: `pip install 'lowrank[quantization]'`.",
            )
        device = groups[0]["params"][0].device
        if paged and device.type == "cpu":  # bitsandbytes would only warn and not page
            raise InputError(
                "paged optimisers page between an accelerator and the host; this run is on the CPU",
                where="training.optim",
                fix="Take the same one without paged_.",
            )
        from bitsandbytes import optim

        eps = {"eps": settings.epsilon} if "Adam" in kind else {}
        return getattr(optim, kind)(groups, lr=settings.learning_rate, betas=settings.betas, **eps)

    return make


OPTIMIZERS: dict[str, Maker] = {
    "adamw_torch_fused": _adamw(fused=True),
    "adamw_torch": _adamw(fused=False),
    "adamw_bnb_8bit": _bitsandbytes("AdamW8bit"),
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit", paged=True),
    "paged_adamw_32bit": _bitsandbytes("PagedAdamW32bit", paged=True),
    "adafactor": _adafactor,
    "lion_32bit": _bitsandbytes("Lion32bit"),
    "lion_8bit": _bitsandbytes("Lion8bit"),
    "paged_lion_8bit": _bitsandbytes("PagedLion8bit", paged=True),
    "paged_lion_32bit": _bitsandbytes("PagedLion32bit", paged=True),
    "muon": _muon,
    "sgd": _sgd,
}
"""By transformers' names, two for one among them; muon is a name of ours."""
