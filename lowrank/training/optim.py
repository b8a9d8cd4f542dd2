"""Optimisers by name, over parameter groups that each have a learning rate and a weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lowrank.adapters.host import AdapterSet
from lowrank.errors import InputError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class GroupRule:
    """What some parameters are trained with.

    Attributes:
        pattern: A regular expression that is searched for in the parameter's name.
        learning_rate: None for the run's.
        weight_decay: None for the run's.
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Settings:
    """What an optimiser is made with.

    Attributes:
        learning_rate: The highest.
        weight_decay: On matrices; biases, norms and magnitudes are vectors and go without.
        betas: Of AdamW and Lion; Muon's momentum is the first.
        epsilon: AdamW's.
        loraplus_lr_ratio: LoRA+ (Hayou 2024): B learns so many times as fast as A; None for the same.
        loraplus_lr_embedding: With LoRA+, the learning rate of embeddings' factors.
        rules: Stand before all that; of several that fit a parameter, the first.
    """

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    rules: Sequence[GroupRule] = ()


def build_optimizer(model: nn.Module, settings: Settings, name: str = "adamw_torch_fused") -> torch.optim.Optimizer:
    """An optimiser over what requires gradients.

    Args:
        model: Adapters in.
        settings: See there.
        name: One of `OPTIMIZERS`.

    Raises:
        InputError: the optimiser cannot serve this machine or these parameters, or a rule fits no parameter.
    """
    groups = parameter_groups(model, settings)
    if name not in OPTIMIZERS:
        raise InputError(f"there is no optimiser {name!r}; there are {', '.join(OPTIMIZERS)}", where="training.optim")
    return OPTIMIZERS[name](groups, settings)


def parameter_groups(model: nn.Module, settings: Settings) -> Groups:
    """What trains, by learning rate and weight decay; the group of the run's own learning rate first."""
    hosts = dict(model.named_modules())
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = {rule.pattern for rule in settings.rules}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = _learning_rate(name, parameter, hosts, settings)
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        rule = next((rule for rule in settings.rules if re.search(rule.pattern, name)), None)
        if rule is not None:
            unused.discard(rule.pattern)
            rate = rate if rule.learning_rate is None else rule.learning_rate
            decay = decay if rule.weight_decay is None else rule.weight_decay
        found.setdefault((rate, decay), []).append(parameter)
    if unused:
        raise InputError(
            f"nothing that trains has a name with {', '.join(map(repr, sorted(unused)))} in it",
            where="training.parameter_groups",
            fix="Names look like model.layers.0.self_attn.q_proj.adapters.default.lora_A.",
        )
    order = sorted(found, key=lambda key: key[0] != settings.learning_rate)
    return [{"params": found[key], "lr": key[0], "weight_decay": key[1]} for key in order]


def _learning_rate(name: str, parameter: nn.Parameter, hosts: dict[str, nn.Module], settings: Settings) -> float:
    """As peft's `create_loraplus_optimizer` divides them: vectors learn as B does."""
    if settings.loraplus_lr_ratio is None:
        return settings.learning_rate
    host = hosts.get(name.split(f".{AdapterSet.CHILD}.")[0])
    if isinstance(host, nn.Embedding):
        return settings.loraplus_lr_embedding
    fast = name.endswith("lora_B") or parameter.ndim == 1
    return settings.learning_rate * (settings.loraplus_lr_ratio if fast else 1.0)


def _adamw(groups: Groups, settings: Settings, fused: bool) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2019)."""
    return torch.optim.AdamW(groups, settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=fused)


def _adafactor(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """Adafactor (Shazeer 2018): the second moment of a matrix from its rows and columns."""
    return torch.optim.Adafactor(groups, settings.learning_rate)


def _sgd(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, settings.learning_rate)


def _muon(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """Muon (Jordan 2024); its updates scaled so that AdamW's learning rates fit (Liu 2025)."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError("this torch has no Muon", where="training.optim", fix="Take torch 2.9 or newer.")
    vectors = sum(parameter.ndim != 2 for group in groups for parameter in group["params"])
    if vectors:
        raise InputError(
            f"Muon is for matrices, and {vectors} of the parameters that train are none",
            where="training.optim",
            fix="Take LoRA without biases, or another optimiser.",
        )
    momentum = settings.betas[0]
    return torch.optim.Muon(groups, settings.learning_rate, momentum=momentum, adjust_lr_fn="match_rms_adamw")


def _bitsandbytes(kind: str, paged: bool = False) -> Callable[[Groups, Settings], torch.optim.Optimizer]:
    """An optimiser of bitsandbytes (Dettmers 2021): states in 8 bits, or paged out to the host's memory."""

    def make(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
        if find_spec("bitsandbytes") is None:
            raise InputError(
                "it needs bitsandbytes, which is not installed", where="training.optim", fix="pip install bitsandbytes"
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


OPTIMIZERS: dict[str, Callable[[Groups, Settings], torch.optim.Optimizer]] = {
    "adamw_torch_fused": lambda groups, settings: _adamw(groups, settings, fused=True),
    "adamw_torch": lambda groups, settings: _adamw(groups, settings, fused=False),
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
"""By transformers' names."""
