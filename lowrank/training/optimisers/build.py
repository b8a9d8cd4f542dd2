"""Optimisers by name, over parameter groups that each have a learning rate and a weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from lowrank.adapters.install import AdapterSet
from lowrank.errors import InputError
from lowrank.training.optimisers.muon import Groups, MuonWithAdamW, for_muon


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
class OptimizerSettings:
    """What an optimiser is made with.

    Attributes:
        learning_rate: The highest.
        weight_decay: On matrices, embeddings among them; biases, norms and magnitudes are vectors and go without.
        betas: Of AdamW and Lion; Muon's momentum is the first. Adafactor and SGD have none.
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


Maker = Callable[[nn.Module, Groups, OptimizerSettings], torch.optim.Optimizer]
"""Makes an optimiser over groups of a model's parameters."""


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, name: str = "adamw_torch_fused"
) -> torch.optim.Optimizer:
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
    return OPTIMIZERS[name](model, groups, settings)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> Groups:
    """What trains, by learning rate and weight decay; the group of the run's own learning rate first."""
    hosts = dict(model.named_modules())
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    idle, nameless = set(settings.rules), set(settings.rules)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = _learning_rate(name, parameter, hosts, settings)
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        fitting = [rule for rule in settings.rules if re.search(rule.pattern, name)]
        nameless.difference_update(fitting)
        if fitting:
            rule = fitting[0]
            idle.discard(rule)
            rate = rate if rule.learning_rate is None else rule.learning_rate
            decay = decay if rule.weight_decay is None else rule.weight_decay
        found.setdefault((rate, decay), []).append(parameter)
    _refuse_idle(idle, nameless)
    order = sorted(found, key=lambda key: key[0] != settings.learning_rate)
    return [{"params": found[key], "lr": key[0], "weight_decay": key[1]} for key in order]


def _refuse_idle(idle: set[GroupRule], nameless: set[GroupRule]) -> None:
    """Rules that no parameter goes by, those that fit no name among them."""
    if not idle:
        return
    told = sorted((rule.pattern, rule in nameless) for rule in idle)
    pattern, fits_nothing = told[0]
    why = "nothing that trains has a name with it" if fits_nothing else "all that it fits goes by an earlier one"
    raise InputError(
        f"{pattern!r} has no effect: {why}",
        where="training.parameter_groups",
        fix="Names look like model.layers.0.self_attn.q_proj.adapters.default.lora_A."
        if fits_nothing
        else "The first that fits is taken: put the narrower pattern first.",
    )


def _learning_rate(
    name: str, parameter: nn.Parameter, hosts: dict[str, nn.Module], settings: OptimizerSettings
) -> float:
    """As peft's `create_loraplus_optimizer` divides them: vectors learn as B does."""
    if settings.loraplus_lr_ratio is None:
        return settings.learning_rate
    host = hosts.get(name.split(f".{AdapterSet.CHILD}.")[0])
    if isinstance(host, nn.Embedding):
        return settings.loraplus_lr_embedding
    fast = name.endswith("lora_B") or parameter.ndim == 1
    return settings.learning_rate * (settings.loraplus_lr_ratio if fast else 1.0)


def _adamw(fused: bool) -> Maker:
    """AdamW (Loshchilov 2019)."""

    def make(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=fused
        )

    return make


def _adafactor(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Adafactor (Shazeer 2018): the second moment of a matrix from its rows and columns.

    With steps as long as the learning rate says, as transformers' Trainer takes it. Steps in proportion to a weight's
    size, torch's only way, would leave lora_B, which begins at zero, where it is.
    """
    from transformers import Adafactor

    return Adafactor(groups, settings.learning_rate, scale_parameter=False, relative_step=False)


def _sgd(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, settings.learning_rate)


def _muon(model: nn.Module, groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
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

    def make(_: nn.Module, groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
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
