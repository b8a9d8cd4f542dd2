"""Which modules of a model a config names, pattern by pattern; a pattern that names nothing is an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule, is_multihead, why_unfit
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.modules import bare, base_modules
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.targeting.patterns import layer_number, listed, nearest
from lowrank.adapters.targeting.routers import routers
from lowrank.adapters.targeting.uncalled import Calls, check_called
from lowrank.errors import InputError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """What an adapter's factors go to.

    Attributes:
        modules: The modules by path, in the model's order.
        matched: How many modules each pattern of `target_modules` matched.
        left_out: Linear layers that "all-linear" leaves out because an adapter would not act there, and why.
    """

    modules: dict[str, nn.Module]
    matched: dict[str, int]
    left_out: dict[str, str]


def find_targets(model: nn.Module, config: AdapterConfig, calls: Calls, also: int = 0) -> Targets:
    """The modules to adapt.

    Args:
        model: Bare or wrapped.
        config: Of the adapter.
        calls: Who calls the model's modules.
        also: How much else the adapter goes to: then it need not name modules.

    Raises:
        InputError: a pattern matches nothing, a module that no adapter fits, or one that nothing calls.
    """
    modules = base_modules(model)
    if not config.target_modules:
        others = ("target_parameters", "trainable_token_indices", "modules_to_save")
        if also or any(getattr(config, field, None) for field in others):
            return Targets({}, {}, {})
        raise InputError("target_modules is empty", fix='Name modules, or take "all-linear".')
    if config.target_modules == ALL_LINEAR:
        return _all_linear(model, modules, config, calls)
    found, counts = _match(modules, config.target_modules)
    kept = {path: modules[path] for path in found if is_kept(path, config)}
    _check_some(kept, found, config)
    for path, module in kept.items():
        if kind_of(module) is None and not is_multihead(module):
            why = calls.fault(path) or why_unfit(module)
            raise InputError(
                f"{path} is a {type(module).__name__}, and no adapter fits that{f': {why}' if why else ''}",
                fix="Name linear layers, embeddings or convolutions; name the layers inside a block, not the block.",
            )
        check_called(calls, path)
    return Targets(kept, counts, {})


def _check_some(kept: Collection[str], found: list[str], config: AdapterConfig) -> None:
    if not kept:
        raise InputError(
            f"no module is left to adapt: target_modules matched {len(found)}, and exclude_modules, modules_to_save or "
            "layers_to_transform leave none of them"
        )
    anywhere = config.model_copy(update={"layers_to_transform": None, "layers_pattern": None})
    for name in config.target_modules if isinstance(config.target_modules, list) else ():
        of_name = [path for path in found if matches_end(path, name) and is_kept(path, anywhere)]
        if of_name and not set(of_name) & set(kept):
            raise InputError(
                f"target_modules: {name!r} matches {of_name[0]}, and layers_to_transform leaves it out",
                fix="Name it by its full path, which is taken as it stands, or leave it out.",
            )


def _match(modules: Mapping[str, nn.Module], targets: list[str] | str) -> tuple[list[str], dict[str, int]]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(f"target_modules is not a regular expression: {targets!r} ({error})") from None
        found = [path for path in modules if pattern.fullmatch(path)]
        if not found:
            raise InputError(
                _nothing(targets, modules),
                fix="A string must match a module's whole path; a list matches ends.",
            )
        return found, {targets: len(found)}
    counts: Counter[str] = Counter(dict.fromkeys(targets, 0))
    found = []
    for path in modules:
        matching = [target for target in targets if matches_end(path, target)]
        counts.update(matching)
        if matching:
            found.append(path)
    missing = [target for target, count in counts.items() if not count]
    if missing:
        raise InputError("; ".join(_nothing(target, modules) for target in missing))
    return found, dict(counts)


def _nothing(target: str, modules: Mapping[str, nn.Module]) -> str:
    hint = nearest(target, modules)
    fused = fused_experts(modules)
    if fused:
        hint += f"; its experts are parameters, {', '.join(fused)}: name those in target_parameters"
    return f"target_modules: {target!r} matches no module; {hint}"


def fused_experts(modules: Mapping[str, nn.Module]) -> list[str]:
    """The three-dimensional parameters of modules that hold all experts in one, as "experts.gate_up_proj"."""
    return sorted(
        {
            f"{path.rpartition('.')[2]}.{name}"
            for path, module in modules.items()
            if kind_of(module) is None and not isinstance(module, _ConvNd)
            for name in (*module._parameters, *getattr(module, "parametrizations", ()))
            if getattr(getattr(module, name), "ndim", 0) == 3
        }
    )


def _all_linear(model: HostModule, modules: Mapping[str, nn.Module], config: AdapterConfig, calls: Calls) -> Targets:
    """Every linear layer but the output head, a classification head, routers of experts, and what is not called."""
    inner: HostModule = bare(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    passed = {id(head)} | {id(modules[name]) for name in ("score", "classifier", "qa_outputs") if name in modules}
    passed |= {id(modules[path]) for path in routers(modules)}
    found, left_out = [], {}
    for path, module in modules.items():
        kind = kind_of(module)
        if id(module) in passed or not (isinstance(module, nn.Linear) if kind is None else kind.linear):
            continue
        why = calls.fault(path) or (why_unfit(module) if kind is None else None)
        if why is None:
            found.append(path)
        elif is_kept(path, config):
            left_out[path] = why
    if not found:
        raise InputError(f"{ALL_LINEAR!r} matches nothing: {type(inner).__name__} has no linear layer that is called")
    kept = {path: modules[path] for path in found if is_kept(path, config)}
    _check_some(kept, found, config)
    return Targets(kept, {ALL_LINEAR: len(found)}, left_out)


def is_kept(path: str, config: AdapterConfig) -> bool:
    """Whether neither exclude_modules nor modules_to_save nor layers_to_transform leaves the module out.

    A module named by its full path is taken in whatever layer it is, or outside of all of them.
    """
    excluded = config.exclude_modules
    if isinstance(excluded, str) and re.fullmatch(excluded, path):
        return False
    if isinstance(excluded, list) and any(matches_end(path, name) for name in excluded):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in config.modules_to_save or []):
        return False
    if config.layers_to_transform is None or path in listed(config.target_modules):
        return True
    given = config.layers_to_transform
    return layer_number(path, config) in (given if isinstance(given, list) else [given])
