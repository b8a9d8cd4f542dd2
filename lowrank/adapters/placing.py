"""The layers of an adapter, each put on its module: factors, copies of whole modules, single tokens, biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.dense_base import is_quantised
from lowrank.adapters.experts.fused import ExpertFactors, experts_layers
from lowrank.adapters.experts.single import SinglePlace, single_experts_layers
from lowrank.adapters.install import hosts, install
from lowrank.adapters.kinds.kind import HostModule, is_multihead
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.methods.layer import LowRankLayer, SharedTensors, matrix_of
from lowrank.adapters.methods.method import Outset
from lowrank.adapters.modules import base_modules, named_parameters, submodule
from lowrank.adapters.multihead import MultiheadLayer, biases
from lowrank.adapters.offload import weights_here
from lowrank.adapters.plain_weight import has_other_codes
from lowrank.adapters.record import Record, record_of
from lowrank.adapters.registry import method_of
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.targeting.patterns import nearest
from lowrank.adapters.targeting.uncalled import Calls, check_copy_called
from lowrank.adapters.token_rows import token_layers
from lowrank.adapters.tying import check_fields, followers, tied_group, with_first
from lowrank.adapters.whole_modules import BiasCopy, WholeCopy
from lowrank.errors import InputError


def put_in(
    model: nn.Module,
    outset: Outset,
    adapter: str,
    targets: dict[str, nn.Module],
    singles: dict[str, SinglePlace],
    calls: Calls,
) -> None:
    """Builds an adapter's layers and puts them on the modules of a model, whose record knows the adapter.

    Args:
        model: It may carry other adapters.
        outset: What the method has worked out; its config says what to build.
        adapter: The adapter's name.
        targets: The modules that get factors, by path.
        singles: The single experts that do.
        calls: Who calls the model's modules.
    """
    config, record = outset.config, record_of(model)
    group = tied_group(model, config)
    if group is not None and any(path in targets for path in (group[0], *group[1])):
        check_fields(config, group[0])

    def place(layers: Mapping[str, nn.Module]) -> None:
        for path, layer in layers.items():
            _place(path, submodule(model, path), layer, adapter, record)

    shared = _shared(outset, targets)
    for path, module in with_first(targets, group, model).items():
        _place(path, module, _with_factors(path, module, outset, shared), adapter, record)
    place(experts_layers(model, config))
    wholes = with_first(_modules_to_save(model, config, calls), group, model)
    place({path: WholeCopy(module) for path, module in wholes.items()})
    place(followers(model, adapter, group))
    tokens = token_layers(model, config, calls)
    for path in tokens:
        if outer := _enclosing(path, _saved_whole(model, adapter)):
            raise InputError(f"trainable_token_indices: {path} is in {outer}, which modules_to_save trains whole")
    place(tokens)
    if config.bias == "all":
        place({path: BiasCopy(module, kind_of(module)) for path, module in _with_bias(model, adapter, calls).items()})
    place(single_experts_layers(model, config, singles))


def _shared(outset: Outset, targets: Mapping[str, HostModule]) -> SharedTensors | None:
    """What all layers of the adapter have in common, beside the first weight; None where its method has no such."""
    kinds = {path: kind_of(module) for path, module in targets.items()}
    matrices = [matrix_of(path, targets[path], kind) for path, kind in kinds.items() if kind is not None]
    tensors = method_of(outset.config).shared_for(outset.config, matrices)
    if not tensors:
        return None
    weights = [targets[matrix.path].weight for matrix in matrices]
    return SharedTensors(tensors).to(next((weight.device for weight in weights if not weight.is_meta), None))


def _with_factors(path: str, module: nn.Module, outset: Outset, shared: SharedTensors | None) -> nn.Module:
    kind = kind_of(module)
    if kind is None:  # the one module with two matrices that find_targets lets through
        return MultiheadLayer.build(outset.config, path, module)
    with weights_here(module):
        return LowRankLayer.build(method_of(outset.config), outset.config, path, module, kind, outset, shared)


def _place(path: str, module: nn.Module, layer: nn.Module, adapter: str, record: Record) -> None:
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise InputError(
            f"{path} is offloaded, and only factors (target_modules) can be trained there",
            fix="Load the model without offloading (device_map).",
        )
    adapters = install(module, record.activity)
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
