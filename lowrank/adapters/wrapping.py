"""Putting an adapter into a model, and taking it out again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.activity import Setting
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.experts.single import SinglePlace, find_single_experts, without_single_experts
from lowrank.adapters.fastpath import give_back, take_dense
from lowrank.adapters.foreign import refuse_foreign
from lowrank.adapters.heads import with_head
from lowrank.adapters.inplace import places_of
from lowrank.adapters.install import Activity, AdapterSet, hosts, remove
from lowrank.adapters.methods.method import Batches, Originals
from lowrank.adapters.modules import bare, base_modules, named_parameters
from lowrank.adapters.offload import refuse_empty
from lowrank.adapters.placing import put_in
from lowrank.adapters.plain_weight import check_none_hidden, check_plain
from lowrank.adapters.record import Record, attach, detach, find_record, record_of
from lowrank.adapters.registry import method_of
from lowrank.adapters.targeting.parameters import find_parameters
from lowrank.adapters.targeting.patterns import check_patterns, without_idle, without_missing
from lowrank.adapters.targeting.targets import ALL_LINEAR, Targets, find_targets
from lowrank.adapters.targeting.uncalled import Calls, check_called
from lowrank.errors import InputError
from lowrank.quantisers.untrainable import refuse_untrainable

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    config: AdapterConfig,
    adapter: str = "default",
    *,
    trainable: bool = True,
    batches: Batches | None = None,
    originals: Originals | None = None,
) -> Model:
    """Puts an adapter into a model, in place, and makes it the active one.

    The base's parameters stop requiring gradients; the adapter's are float32 (float64 beside float64 weights) on the
    devices of the modules they sit on. Class, module names and the names of the base's parameters stay as they were.

    Args:
        model: Any `torch.nn.Module`; one that carries adapters already gets one more.
        config: What to put in, and where.
        adapter: Its name.
        trainable: Whether its parameters require gradients.
        batches: For `init_lora_weights: eva`: a few batches, each the keyword arguments of the model's forward.
        originals: For `init_lora_weights: loftq`: gives a weight (out, in) as it was before it was quantised, by name.

    Returns:
        The same model.

    Raises:
        InputError: the name is taken or not usable, a pattern matches nothing, a field does not fit the model.
            The model is then as it was.
    """
    record = find_record(model)
    _check_name(adapter, record)
    _check_model(model, record)
    if trainable:
        refuse_untrainable(model)
    found = _find(model, with_head(model, config))
    outset = method_of(config).prepare(bare(model), found.config, found.targets.modules, batches, originals)
    if record is None:
        record = Record(trained_before={name for name, p in named_parameters(model) if p.requires_grad})
        model.requires_grad_(False)
        attach(model, record)
    record.configs[adapter] = outset.config
    record.matched[adapter], record.left_out[adapter] = found.matched, found.targets.left_out
    record.strengths[adapter] = Setting(1.0)
    try:
        put_in(model, outset, adapter, found.targets.modules, found.singles, found.calls)
    except BaseException:
        delete(model, adapter)
        raise
    for _, _, adapters in hosts(model):
        if adapter in adapters and not trainable:
            adapters[adapter].requires_grad_(False)
    take_dense(model)
    record.places |= places_of(model, (adapter,))
    record.activity.names = (adapter,)
    return model


@dataclass(frozen=True, slots=True)
class _Found:
    """What a config means on a model, each of its entries proved to mean something."""

    config: AdapterConfig
    targets: Targets
    singles: dict[str, SinglePlace]
    matched: dict[str, int]
    calls: Calls


def _find(model: nn.Module, config: AdapterConfig) -> _Found:
    calls = Calls(model)
    singles = find_single_experts(model, config)
    targets = find_targets(model, without_single_experts(config, singles), calls, also=len(singles))
    for path, module in targets.modules.items():
        check_plain(path, module)
    if config.target_modules == ALL_LINEAR:
        check_none_hidden(base_modules(model))
    parameters, counts = find_parameters(model, config)
    check_patterns(config, base_modules(model), [*_adapted_paths(targets, parameters), *singles])
    for path, names in parameters.items():
        check_called(calls, path, names)
    _check_layout(config, targets.modules)
    return _Found(config, targets, singles, targets.matched | counts, calls)


def unwrap(model: Model) -> Model:
    """Takes all adapters out: the modules are the ones that were there before, bit for bit. Returns the same model."""
    record = record_of(model)
    for _, module, _ in list(hosts(model)):
        remove(module)
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(name in record.trained_before)
    give_back(model)
    detach(model)
    return model


def delete(model: nn.Module, adapter: str) -> None:
    """Takes one adapter out; the last one's end is `unwrap`'s."""
    record = record_of(model)
    record.check_known((adapter,))
    if len(record.configs) == 1:
        unwrap(model)
        return
    _check_free(record, adapter)
    for told in (record.configs, record.matched, record.left_out, record.strengths, record.places):
        told.pop(adapter, None)
    record.activity.names = tuple(name for name in record.activity.names if name != adapter)
    for _, module, adapters in list(hosts(model)):
        if adapter in adapters:
            del adapters[adapter]
        if not adapters:
            remove(module)


def rename(model: nn.Module, adapter: str, to: str) -> None:
    """Gives an adapter another name, outside of blocks that know it by the old one."""
    record = record_of(model)
    record.check_known((adapter,))
    _check_free(record, adapter)
    _check_name(to, record)
    record.configs[to] = record.configs.pop(adapter)
    record.matched[to] = record.matched.pop(adapter)
    record.strengths[to] = record.strengths.pop(adapter)
    record.left_out[to] = record.left_out.pop(adapter)
    record.places[to] = record.places.pop(adapter)
    record.activity.names = tuple(to if name == adapter else name for name in record.activity.names)
    for _, _, adapters in hosts(model):
        if adapter in adapters:
            adapters[to] = adapters.pop(adapter)


def for_this_model(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config of an adapter from a file, without the entries that name nothing on this model: other programs pass
    over them. That each of the file's tensors has a place is proved when they are filled in."""
    modules = base_modules(model)
    config = without_missing(config, modules)
    targets = find_targets(model, config, Calls(model))
    return without_idle(config, modules, _adapted_paths(targets, find_parameters(model, config)[0]))


def _adapted_paths(targets: Targets, parameters: dict[str, list[str]]) -> list[str]:
    """What factors go to: the paths of modules, and of parameters."""
    return [*targets.modules, *(f"{path}.{name}" for path, names in parameters.items() for name in names)]


def _check_name(adapter: str, record: Record | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", adapter) or hasattr(AdapterSet(Activity()), adapter):
        raise InputError(f"{adapter!r} is no name for an adapter", fix="Take letters, digits, _ and -.")
    if record is not None and adapter in record.configs:
        raise InputError(f"the model has an adapter {adapter!r} already", fix="Take another name, or delete that one.")


def _check_free(record: Record, adapter: str) -> None:
    now = record.activity.now
    routed = () if now.routing is None else now.routing.names
    if now is not record.activity.value and adapter in (*now.names, *routed):
        raise InputError(f"the adapter {adapter!r} acts in a block that is open here", fix="Do this after the block.")


def _check_model(model: nn.Module, record: Record | None) -> None:
    _check_level(model, record)
    refuse_foreign(model)
    refuse_empty(model)
    _refuse_several_processes(model)


def _check_level(model: nn.Module, record: Record | None) -> None:
    """Adapters obey the record of the module that they were wrapped through, and there is one of those."""
    if record is None and (inner := next((path for path, _, _ in hosts(model)), None)) is not None:
        raise InputError(
            f"{inner} carries an adapter that was put in through another module than this {type(model).__name__}",
            fix="Wrap the same model each time: the whole one, or the same part of it.",
        )


def _refuse_several_processes(model: nn.Module) -> None:
    """DDP has counted the parameters that it keeps alike in all processes: those of a new adapter would drift apart."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and torch.distributed.get_world_size() > 1:
        raise InputError(
            "the model is inside DistributedDataParallel, which would not average the gradients of a new adapter",
            fix="Call lowrank.wrap or lowrank.load first, and DistributedDataParallel on what it returns.",
        )


def _check_layout(config: AdapterConfig, targets: dict[str, nn.Module]) -> None:
    if config.fan_in_fan_out and targets and not any(isinstance(module, Conv1D) for module in targets.values()):
        raise InputError(
            "fan_in_fan_out is true, and none of the adapted modules stores its weight that way",
            fix="Leave it out: the layout is read from the modules.",
        )
