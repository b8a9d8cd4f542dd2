"""Putting adapters into a model and taking them out again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.activity import Setting
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.dense_base import is_quantised
from lowrank.adapters.experts.fused import ExpertFactors, experts_layers
from lowrank.adapters.experts.single import find_single_experts, single_experts_layers, without_single_experts
from lowrank.adapters.fastpath import give_back, take_dense
from lowrank.adapters.foreign import refuse_foreign
from lowrank.adapters.heads import with_head
from lowrank.adapters.initialisations.outside import Batches, Originals, Outside
from lowrank.adapters.inplace import places_of
from lowrank.adapters.install import Activity, AdapterSet, hosts, install, remove
from lowrank.adapters.kinds.kind import Kind, is_multihead, kind_of
from lowrank.adapters.methods.layer import LowRankLayer
from lowrank.adapters.methods.lora import LoraLayer
from lowrank.adapters.modules import bare, base_modules, named_parameters, submodule
from lowrank.adapters.multihead import MultiheadLayer, biases
from lowrank.adapters.offload import refuse_empty, weights_here
from lowrank.adapters.plain_weight import check_none_hidden, check_plain, has_other_codes
from lowrank.adapters.record import Record, attach, detach, find_record, record_of
from lowrank.adapters.registry import METHODS
from lowrank.adapters.targeting.parameters import find_parameters
from lowrank.adapters.targeting.patterns import check_patterns, matches_end, nearest, without_idle, without_missing
from lowrank.adapters.targeting.targets import ALL_LINEAR, Targets, find_targets
from lowrank.adapters.targeting.uncalled import Calls, check_called, check_copy_called
from lowrank.adapters.token_rows import token_layers
from lowrank.adapters.tying import check_fields, followers, tied_group, with_first
from lowrank.adapters.whole_modules import BiasCopy, WholeCopy
from lowrank.errors import InputError

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
    _check_level(model, record)
    refuse_foreign(model)
    refuse_empty(model)
    _refuse_several_processes(model)
    calls = Calls(model)
    config = with_head(model, config)
    singles = find_single_experts(model, config)
    targets = find_targets(model, without_single_experts(config, singles), calls, also=len(singles))
    for path, module in targets.modules.items():
        check_plain(path, module)
    if config.target_modules == ALL_LINEAR:
        check_none_hidden(base_modules(model))
    parameters, parameter_counts = find_parameters(model, config)
    check_patterns(config, base_modules(model), [*adapted_paths(targets, parameters), *singles])
    for path, names in parameters.items():
        check_called(calls, path, names)
    _check_layout(config, targets.modules)
    outside = Outside(bare(model), config, targets.modules, batches, originals)
    if record is None:
        record = Record(trained_before={name for name, p in named_parameters(model) if p.requires_grad})
        model.requires_grad_(False)
        attach(model, record)
    record.configs[adapter], record.matched[adapter] = outside.config, targets.matched | parameter_counts
    record.left_out[adapter] = targets.left_out
    record.strengths[adapter] = Setting(1.0)
    try:
        _put_in(model, outside, adapter, record, targets.modules, calls)
        for path, layer in single_experts_layers(model, config, singles).items():
            _place(path, submodule(model, path), None, layer, adapter, record)
    except BaseException:
        delete(model, adapter)
        raise
    for _, _, adapters in hosts(model):
        if adapter in adapters and not trainable:
            adapters[adapter].requires_grad_(False)
    take_dense(model)
    record.places[adapter] = places_of(model, adapter)
    record.activity.names = (adapter,)
    return model


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
    return without_idle(config, modules, adapted_paths(targets, find_parameters(model, config)[0]))


def adapted_paths(targets: Targets, parameters: dict[str, list[str]]) -> list[str]:
    """What factors go to: the paths of modules, and of parameters."""
    return [*targets.modules, *(f"{path}.{name}" for path, names in parameters.items() for name in names)]


def _put_in(
    model: nn.Module, outside: Outside, adapter: str, record: Record, targets: dict[str, nn.Module], calls: Calls
) -> None:
    config = outside.config
    method, group = METHODS[config.method_name], tied_group(model, outside.config)
    if group is not None and any(path in targets for path in (group[0], *group[1])):
        check_fields(config, group[0])
    for path, module in with_first(targets, group, model).items():
        kind = kind_of(module)
        if kind is None:  # the one module with two matrices that find_targets lets through
            _place(path, module, None, MultiheadLayer.build(config, path, module), adapter, record)
            continue
        with weights_here(module):
            layer = method.build(config, path, module, kind)
            if isinstance(layer, LoraLayer):
                outside.fill(path, module, layer)
        _place(path, module, kind, layer, adapter, record)
    for path, layer in experts_layers(model, config).items():
        module = submodule(model, path)
        _place(path, module, kind_of(module), layer, adapter, record)
    for path, module in with_first(_modules_to_save(model, config, calls), group, model).items():
        _place(path, module, kind_of(module), WholeCopy(module), adapter, record)
    for path, layer in followers(model, adapter, group).items():
        module = submodule(model, path)
        _place(path, module, kind_of(module), layer, adapter, record)
    for path, rows in token_layers(model, config, calls).items():
        if outer := _enclosing(path, _saved_whole(model, adapter)):
            raise InputError(f"trainable_token_indices: {path} is in {outer}, which modules_to_save trains whole")
        module = submodule(model, path)
        _place(path, module, kind_of(module), rows, adapter, record)
    if config.bias == "all":
        for path, module in _with_bias(model, adapter, calls).items():
            _place(path, module, kind_of(module), BiasCopy(module), adapter, record)


def _place(path: str, module: nn.Module, kind: Kind | None, layer: nn.Module, adapter: str, record: Record) -> None:
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise InputError(
            f"{path} is offloaded, and only factors (target_modules) can be trained there",
            fix="Load the model without offloading (device_map).",
        )
    adapters = install(module, kind, record.activity)
    if adapter in adapters:
        raise InputError(
            f"{path} is asked for twice",
            fix="A module is adapted, saved whole, or has single tokens trained: take it out of all but one of "
            "target_modules, modules_to_save and trainable_token_indices.",
        )
    if isinstance(layer, WholeCopy):  # what it holds has its modes, part by part
        layer.training = module.training
    else:
        layer.train(module.training)
    for part in layer.modules():
        if isinstance(part, (LowRankLayer, ExpertFactors)):
            part.strength = record.strengths[adapter]
    adapters[adapter] = layer


def _modules_to_save(model: nn.Module, config: AdapterConfig, calls: Calls) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    modules = base_modules(model)
    for name in config.modules_to_save or []:
        matching = {path: module for path, module in modules.items() if matches_end(path, name)}
        if not matching:
            raise InputError(f"modules_to_save: {name!r} matches no module; {nearest(name, modules)}")
        found |= matching
    for path, module in found.items():
        check_copy_called(calls, path)
        if outer := _enclosing(path, found):
            raise InputError(f"modules_to_save names {path} and {outer}, which holds it", fix="Name one of them.")
        if has_other_codes(module) or any(is_quantised(inner) for inner in module.modules()):
            raise InputError(
                f"modules_to_save: {path} is quantised, and a quantised weight cannot be trained whole",
                fix="Adapt it, or leave it out when the base is quantised (llm_int8_skip_modules).",
            )
    return found


def _saved_whole(model: nn.Module, adapter: str) -> list[str]:
    """The modules in whose place a copy of this adapter stands: what is inside of them is not called."""
    return [path for path, _, adapters in hosts(model) if isinstance(adapters.layers().get(adapter), WholeCopy)]


def _enclosing(path: str, others: Iterable[str]) -> str | None:
    """The one of the other modules that holds the one at `path`."""
    return next((other for other in others if path.startswith(f"{other}.")), None)


def _with_bias(model: nn.Module, adapter: str, calls: Calls) -> dict[str, nn.Module]:
    """Modules of the base with a bias that this adapter does not hold yet.

    Raises:
        InputError: a bias that is not simply added to its module's output.
    """
    ours = {id(parameter) for _, _, adapters in hosts(model) for parameter in adapters.parameters()}
    ours_too = [module for _, module, adapters in hosts(model) if adapter in adapters]
    held = {id(module.bias) for module in ours_too if hasattr(module, "bias")}
    held |= {id(bias) for module in ours_too if is_multihead(module) for bias in biases(module)}
    whole = _saved_whole(model, adapter)
    found = {}
    for name, parameter in named_parameters(model):
        path, _, last = name.rpartition(".")
        if "bias" not in last or id(parameter) in ours | held or _enclosing(path, whole):
            continue
        module = submodule(model, path)
        why = calls.fault(path, ("bias",))
        if why or last != "bias" or (kind_of(module) is None and not isinstance(module, nn.LayerNorm)):
            raise InputError(
                f"bias: all cannot train {name}: "
                + (why or f"a {type(module).__name__} does not simply add it to its output"),
                fix="Take bias: lora_only, or name the module in modules_to_save.",
            )
        found[path] = module
    return found


def _check_name(adapter: str, record: Record | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", adapter) or hasattr(AdapterSet(None, Activity()), adapter):
        raise InputError(f"{adapter!r} is no name for an adapter", fix="Take letters, digits, _ and -.")
    if record is not None and adapter in record.configs:
        raise InputError(f"the model has an adapter {adapter!r} already", fix="Take another name, or delete that one.")


def _check_free(record: Record, adapter: str) -> None:
    now = record.activity.now
    routed = () if now.routing is None else now.routing.rows
    if now is not record.activity.value and adapter in (*now.names, *routed):
        raise InputError(f"the adapter {adapter!r} acts in a block that is open here", fix="Do this after the block.")


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
