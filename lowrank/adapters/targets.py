"""Which modules of a model a config names, pattern by pattern; a pattern that names nothing is an error."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds import HostModule, is_multihead, kind_of
from lowrank.adapters.uncalled import check_called, reader_of
from lowrank.errors import InputError

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The modules to adapt.

    Returns:
        Their paths and modules in the model's order, and how many each pattern of `target_modules` matched.

    Raises:
        InputError: a pattern matches nothing, or a module that no adapter fits.
    """
    modules = {path: module for path, module in model.named_modules() if path and "adapters" not in path.split(".")}
    if not config.target_modules:
        if getattr(config, "target_parameters", None) or getattr(config, "trainable_token_indices", None):
            return {}, {}
        raise InputError("target_modules is empty", fix='Name modules, or take "all-linear".')
    found, counts = _match(model, modules, config.target_modules)
    kept = {path: modules[path] for path in found if is_kept(path, config)}
    if not kept:
        raise InputError(
            f"no module is left to adapt: target_modules matched {len(found)}, and exclude_modules, modules_to_save or "
            "layers_to_transform leave none of them"
        )
    for path, module in kept.items():
        if kind_of(module) is None and not is_multihead(module):
            raise InputError(
                f"{path} is a {type(module).__name__}, and no adapter fits that",
                fix="Name linear layers, embeddings or convolutions; name the layers inside a block, not the block.",
            )
        check_called(path, modules)
    return kept, counts


def _match(
    model: nn.Module, modules: Mapping[str, nn.Module], targets: list[str] | str
) -> tuple[list[str], dict[str, int]]:
    if targets == ALL_LINEAR:
        found = _all_linear(model, modules)
        if not found:
            raise InputError(f"{ALL_LINEAR!r} matches nothing: {type(model).__name__} has no linear layer")
        return found, {ALL_LINEAR: len(found)}
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
    names = sorted({path.rpartition(".")[2] for path in modules if not path.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(target.rpartition(".")[2], names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"this model has {', '.join(names)}"
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


def matches_end(path: str, name: str) -> bool:
    """Whether `name` is `path` or stands at its end, at a dot."""
    return path == name or path.endswith(f".{name}")


_T = TypeVar("_T")


def pattern_value(patterns: Mapping[str, _T], path: str, default: _T) -> _T:
    """The value of the first pattern that matches at the end of `path` (peft's rule for rank_pattern)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _all_linear(model: HostModule, modules: Mapping[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head, a classification head, routers of experts, and what is not called."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {id(head)} | {id(modules[name]) for name in ("score", "classifier", "qa_outputs") if name in modules}
    experts = _expert_count(model)
    return [
        path
        for path, module in modules.items()
        if (kind := kind_of(module)) is not None
        and kind.linear
        and id(module) not in heads
        and not _is_router(path, module, experts)
        and reader_of(path, modules) is None
    ]


def _expert_count(model: nn.Module) -> set[int]:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {value for name in names if isinstance(value := getattr(text, name, None), int)}


def _is_router(path: str, module: nn.Module, experts: set[int]) -> bool:
    name = path.rpartition(".")[2]
    return getattr(module, "out_features", None) in experts and bool(re.search(r"gate|router|classifier", name))


def is_kept(path: str, config: AdapterConfig) -> bool:
    """Whether neither exclude_modules nor modules_to_save nor layers_to_transform leaves the module out."""
    excluded = config.exclude_modules
    if isinstance(excluded, str) and re.fullmatch(excluded, path):
        return False
    if isinstance(excluded, list) and any(matches_end(path, name) for name in excluded):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or []):
        return False
    return _in_layers(path, config)


def _in_layers(path: str, config: AdapterConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    layers = (
        config.layers_to_transform if isinstance(config.layers_to_transform, list) else [config.layers_to_transform]
    )
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(match.group(1)) in layers
    return False
