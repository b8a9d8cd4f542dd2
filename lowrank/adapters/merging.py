"""Adapters into the base's own weights, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from lowrank.adapters.dense_base import dense_dtype, dense_twin, forget_quantisation, is_quantised, make_dense
from lowrank.adapters.inplace import check_in_place
from lowrank.adapters.install import AdapterSet, hosts
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.methods.layer import JointLayer, Layer, LowRankLayer
from lowrank.adapters.modules import bare
from lowrank.adapters.offload import refuse_offloaded
from lowrank.adapters.record import Record, record_of
from lowrank.adapters.targeting.parameters import make_parameters_dense, quantised_names
from lowrank.adapters.ties import Ties
from lowrank.adapters.together import check_together
from lowrank.adapters.token_rows import TokenRows
from lowrank.adapters.whole_modules import WholeCopy
from lowrank.adapters.wrapping import unwrap
from lowrank.errors import InputError, JobError
from lowrank.ops.precision import precise

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merge(model: Model, adapters: str | Sequence[str] | None = None) -> Model:
    """Adds adapters to the base weights, in place, and takes all adapters off.

    Sums are in float32 and rounded once to the weight's dtype. A head or embedding that was tied and is adapted gets a
    weight of its own, and the config says so (`tie_word_embeddings: false`, where it has no other meaning). A quantised
    base becomes dense first, a parametrised weight a plain one. Every sum is made and looked at before the first is
    written: it takes a second time to compute, and no more memory than the largest module.

    Args:
        model: A wrapped model.
        adapters: One name or several, whose deltas add; the active ones by default.

    Returns:
        The same model, without adapters.

    Raises:
        InputError: an unknown name, two adapters that cannot act together, or a module that has no place for what an
            adapter does. The model is as it was.
        JobError: a merged weight is not finite. The model is as it was.
    """
    _merge(bare(model), adapters)
    return model


def _merge(model: nn.Module, adapters: str | Sequence[str] | None) -> None:
    record = record_of(model)
    names = _names(record, adapters)
    check_in_place(model, names)
    check_together(model, names)
    quantised = any(is_quantised(module) for module in model.modules())
    dtype = dense_dtype(model)
    for path, module, present in hosts(model):
        refuse_offloaded(path, module, "merged")
        _check(path, module, _chosen(present, names), dtype)
    ties = Ties(model)
    with ExitStack() as undo:
        if quantised:
            make_dense(model, undo)
        for _, module, present in hosts(model):
            _merge_layers(module, _chosen(present, names))
        undo.pop_all()
    unwrap(model)
    ties.settle()
    if quantised:
        forget_quantisation(model)


def _names(record: Record, adapters: str | Sequence[str] | None) -> tuple[str, ...]:
    choice = record.activity.now
    if adapters is None and choice.routing is not None:
        raise InputError("which adapters to merge cannot be told inside of routed()", fix="Name them.")
    names = choice.names if adapters is None else (adapters,) if isinstance(adapters, str) else tuple(adapters)
    record.check_known(names)
    return names


def _chosen(adapters: AdapterSet, names: tuple[str, ...]) -> dict[str, Layer]:
    return {name: adapters.layers()[name] for name in names if name in adapters}


def _check(path: str, module: HostModule, layers: dict[str, Layer], dtype: torch.dtype) -> None:
    """Merges into a twin of the module, which is then forgotten.

    Raises:
        InputError: the module has no place for what a layer does.
        JobError: a value is not finite.
    """
    for layer in layers.values():
        if isinstance(layer, LowRankLayer | TokenRows):
            layer.check_mergeable(path, module)
    twin = dense_twin(module, dtype) if is_quantised(module) and not quantised_names(module) else _twin(module)
    before = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    _merge_layers(twin, layers)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if id(tensor) not in before and not _is_finite(tensor):
            raise JobError(f"merging {', '.join(layers)} into {path} gives values that are not finite")


def _is_finite(tensor: torch.Tensor) -> bool:
    """By its least and greatest value, ten times faster than value by value; NaN is both."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def _twin(module: nn.Module) -> nn.Module:
    """The module again, its parts too, with the same tensors: what is set on it is not set on the module."""
    twin = object.__new__(type(module))
    twin.__dict__.update(
        {name: copy.copy(value) if isinstance(value, dict | list) else value for name, value in vars(module).items()}
    )
    twin.__dict__["_modules"] = {
        name: None if part is None else _twin(part)
        for name, part in module._modules.items()
        if name != AdapterSet.CHILD
    }
    return twin


def _merge_layers(module: HostModule, layers: dict[str, Layer]) -> None:
    acting = list(layers.values())
    if not acting:
        return
    if parametrize.is_parametrized(module) and not isinstance(acting[0], WholeCopy):
        make_parameters_dense(module)  # what is written to a parametrised weight would be changed
    if len(acting) == 1:
        acting[0].merge_into(module)
    elif isinstance(acting[0], JointLayer):
        acting[0].merge_together(module, acting)
    else:
        _merge_several(module, acting)


def _merge_several(module: HostModule, layers: list[Layer]) -> None:
    """Each difference is against the untouched weights, so that the order of the adapters does not matter."""
    own = dict(module.named_parameters(recurse=False))
    exact = {name: nn.Parameter(p.to(precise(p.dtype)), requires_grad=False) for name, p in own.items()}
    sums: dict[str, torch.Tensor] = {}
    for layer in layers:
        alone = _twin(module)
        for name, parameter in exact.items():
            setattr(alone, name, parameter)
        layer.merge_into(alone)
        for name, merged in alone.named_parameters(recurse=False):
            if merged is not exact.get(name):
                sums[name] = sums.get(name, exact[name]) + (merged - exact[name])
    for name, total in sums.items():
        setattr(module, name, nn.Parameter(total.to(own[name].dtype), requires_grad=own[name].requires_grad))
