"""Adapters into the base's own weights, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from lowrank.adapters.dequantise import is_quantised, make_dense
from lowrank.adapters.host import AdapterSet, hosts
from lowrank.adapters.kinds import HostModule
from lowrank.adapters.method import JointLayer, Layer, LowRankLayer
from lowrank.adapters.record import Record, record_of
from lowrank.adapters.together import check_together
from lowrank.adapters.tokens import TokenRows
from lowrank.adapters.wrapping import unwrap
from lowrank.errors import InputError, JobError
from lowrank.ops.merging import merged_weight

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merge(model: Model, adapters: str | Sequence[str] | None = None) -> Model:
    """Adds adapters to the base weights, in place, and takes all adapters off.

    Sums are in float32 and rounded once to the weight's dtype. A head or embedding that was tied and is adapted gets a
    weight of its own, and the config says so (`tie_word_embeddings: false`). A quantised base becomes dense first.

    Args:
        model: A wrapped model.
        adapters: One name or several, whose deltas add; the active ones by default.

    Returns:
        The same model, without adapters.

    Raises:
        InputError: an unknown name, two adapters that replace the same module whole.
        JobError: a merged weight is not finite; the base's weights are then still as they were, up to that module.
    """
    record = record_of(model)
    names = _names(record, adapters)
    check_together(model, names)
    for path, module, present in hosts(model):
        for name, layer in present.layers().items():
            if name in names and isinstance(layer, LowRankLayer | TokenRows):
                layer.check_mergeable(path, module)
    if any(is_quantised(module) for module in model.modules()):
        make_dense(model)
    tied = _is_tied(model)
    for path, module, present in hosts(model):
        layers = [layer for name, layer in present.layers().items() if name in names]
        _merge_layers(path, module, present, layers)
    unwrap(model)
    if tied and not _is_tied(model):
        _untie(model)
    return model


def _names(record: Record, adapters: str | Sequence[str] | None) -> tuple[str, ...]:
    choice = record.activity.now
    if adapters is None and choice.routing is not None:
        raise InputError("which adapters to merge cannot be told inside of routed()", fix="Name them.")
    names = choice.names if adapters is None else (adapters,) if isinstance(adapters, str) else tuple(adapters)
    record.check_known(names)
    return names


def _merge_layers(path: str, module: HostModule, adapters: AdapterSet, layers: list[Layer]) -> None:
    if len(layers) == 1:
        layers[0].merge_into(module, adapters.kind)
    elif (joint := next((layer for layer in layers if isinstance(layer, JointLayer)), None)) is not None:
        joint.merge_together(module, layers)
    elif layers:
        _merge_several(path, module, adapters, layers)
    for parameter in module.parameters(recurse=False):
        if not torch.isfinite(parameter).all():
            raise JobError(f"merging {', '.join(adapters)} into {path} gives values that are not finite")


def _merge_several(path: str, module: HostModule, adapters: AdapterSet, layers: list[Layer]) -> None:
    """Each delta is against the untouched W, so that the order of the adapters does not matter."""
    kind = adapters.kind
    low_rank = [layer for layer in layers if isinstance(layer, LowRankLayer)]
    if kind is None or len(low_rank) < len(layers):
        raise InputError(f"several adapters train {path} whole; merge one of them")
    weight = kind.weight(module)
    merged = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)
    for layer in low_rank:
        merged += merged_weight(weight, layer.term(module, kind)) - weight
    kind.write(module, merged)
    acting = [layer.acting_bias(module) for layer in low_rank]
    if changes := [bias - module.bias for bias in acting if bias is not None and bias is not module.bias]:
        total = torch.stack(changes).sum(0)
        module.bias = nn.Parameter((module.bias + total).to(module.bias.dtype), requires_grad=False)


def _untie(model: HostModule) -> None:
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _is_tied(model: HostModule) -> bool:
    if not hasattr(model, "get_output_embeddings"):
        return False
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", object())
