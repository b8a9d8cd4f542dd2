"""Whether what examples begin with in common is computed once, and why not."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import nn

from lowrank.adapters import METHODS
from lowrank.attention import check_sharing
from lowrank.config.sections import AdapterSection, MethodSection, TrainingSection
from lowrank.data import BatchPlan
from lowrank.data.batches.order import Batches
from lowrank.errors import InputError

Asked = Literal["auto"] | bool
WORTH = 0.05
"""Of the tokens: what sharing saves at least where it is not asked for."""

Plan = TypeVar("Plan", bound=Batches)


def drawing(adapter: AdapterSection, training: TrainingSection) -> str | None:
    """What draws at random for each example, and for what they share once; None where nothing does."""
    if isinstance(adapter, MethodSection) and METHODS[adapter.method].dropout(adapter) > 0:
        return "the adapter's dropout"
    return None if training.neftune_noise_alpha is None else "NEFTune"


def if_worth_it(asked: Asked, plan: BatchPlan) -> BatchPlan:
    """The plan, without sharing where it is not asked for and saves hardly anything."""
    if asked is True or not plan.shares:
        return plan
    saved = 1.0 - plan.passing() / int(plan.examples.lengths.sum())
    return plan if saved >= WORTH else plan.without_sharing(f"examples begin alike for {saved:.1%} of their tokens")


def if_exact(asked: Asked, model: Any, plan: Plan) -> Plan:
    """The plan, without sharing where this model cannot do it.

    Raises:
        InputError: it cannot, and sharing is asked for.
    """
    if not plan.shares:
        return plan
    try:
        check_sharing(model)
    except InputError as error:
        if asked is True:
            fix = "Leave it at auto, or set it to false."
            raise InputError(error.what, where="data.share_prefixes", fix=fix) from error
        return plan.without_sharing(error.what)
    return plan


def unless_it_drops_out(asked: Asked, model: Any, plan: Plan) -> Plan:
    """The plan of training batches, without sharing where it is not asked for and the model has dropout of its own."""
    if asked is True or not plan.shares or not drops_out(model):
        return plan
    return plan.without_sharing("the model's own dropout draws for each")


def drops_out(model: Any) -> bool:
    """Whether the model has dropout: layers, or a number in its config; heads for other tasks have theirs."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    config = vars(model.config.get_text_config())
    named = [name for name in config if "drop" in name and not name.startswith(("classifier", "summary"))]
    return layers or any(isinstance(config[name], float) and config[name] > 0 for name in named)
