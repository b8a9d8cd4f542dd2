"""An adapter's names as a model has them.

The same layers go by several names: in a text model and in the whole model (vision and language) that it was taken out
of, and in releases of transformers that arranged a model otherwise. transformers renames a checkpoint's tensors when it
loads them; an adapter's names go the same way, and between text and whole model by where the text model stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.install import AdapterSet
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.targeting.matching import matches_end, pattern_value
from lowrank.adapters.targeting.parameters import parameter_names
from lowrank.weights.files.adapter_file import TOKENS, AdapterFile
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.fingerprint import text_config

# What stands before a text model's layers, in any release: a tower for images or sound is not taken for one.
_TEXT = frozenset({"", "model", "language_model", "text_model", "transformer", "decoder", "thinker", "llm"})

Modules = Mapping[str, nn.Module]
Rename = Callable[[str], str]


def named_as_in(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter under the names that `model` has for its modules.

    Itself where they are the same, and where no known way leads from the one to the other. Where they differ, its
    config names each module in full: what a pattern matched in the one model says nothing about the other.
    """
    modules = {path: module for path, module in model.named_modules() if AdapterSet.CHILD not in path.split(".")}
    paths = {_path_of(name) for name in adapter.tensors}
    unknown = {path for path in paths if not _known(path, modules)}
    if not unknown or not isinstance(model, PreTrainedModel):
        return adapter
    for rename in _renamings(model, modules, unknown):
        names = {path: rename(path) if path in unknown else path for path in paths}
        if all(_known(path, modules) for path in names.values()) and len(set(names.values())) == len(names):
            return _renamed(adapter, names, modules)
    return adapter


def _path_of(name: str) -> str:
    """The path of the module that a tensor of an adapter's file belongs to."""
    if factor := factor_of(name):
        path = factor.path
    else:
        path = name.removesuffix(TOKENS) if name.endswith(TOKENS) else name.rpartition(".")[0]
    return path.partition(".base_layer")[0]


def _known(path: str, modules: Modules) -> bool:
    """Whether a model has the module, or single experts of it that it holds in one."""
    return path in modules or re.sub(r"\.\d+\.[^.]+$", "", path) in modules


def _renamings(model: PreTrainedModel, modules: Modules, paths: set[str]) -> Iterator[Rename]:
    """Ways from other names to the model's: transformers' own, then those between a text model and what holds it."""
    yield _as_loaded(model, modules)
    text = type(text_config(model.config))
    for home, module in modules.items():
        if isinstance(module, PreTrainedModel) and type(module.config) is text:
            prefix = _common_prefix(home, modules, paths)
            if prefix is not None and set(prefix.split(".")) <= _TEXT:
                yield lambda path, home=home, prefix=prefix: _moved(path, prefix, home, modules)


def _as_loaded(model: PreTrainedModel, modules: Modules) -> Rename:
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = model.base_model_prefix

    def rename(path: str) -> str:
        path = rename_source_key(f"{path}.weight", renamings, [])[0].removesuffix(".weight")
        if _known(path, modules):
            return path
        inner = path.removeprefix(f"{prefix}.")
        return inner if _known(inner, modules) else f"{prefix}.{path}"

    return rename


def _common_prefix(home: str, modules: Modules, paths: set[str]) -> str | None:
    """What stands before names inside the text model at `home`; None where it is not the same for all of them."""
    prefixes = set()
    for path in paths:
        parts = path.split(".")
        for at in range(len(parts)):
            if _known(_join(home, ".".join(parts[at:])), modules):
                prefixes.add(".".join(parts[:at]))
                break
        else:
            if len(parts) > 2:
                return None  # heads stand beside the text model, layers do not
    return prefixes.pop() if len(prefixes) == 1 else None


def _moved(path: str, prefix: str, home: str, modules: Modules) -> str:
    inside = path.removeprefix(f"{prefix}." if prefix else "")
    moved = _join(home, inside)
    return moved if _known(moved, modules) else path.rpartition(".")[2]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _renamed(adapter: AdapterFile, names: Mapping[str, str], modules: Modules) -> AdapterFile:
    tensors = {}
    for name, entry in adapter.tensors.items():
        old = _path_of(name)
        tensors[names[old] + name.removeprefix(old)] = entry
    return replace(adapter, tensors=tensors, config=_config(adapter, names, modules))


def _config(adapter: AdapterFile, names: Mapping[str, str], modules: Modules) -> AdapterConfig:
    """The adapter's config with every module named in full."""
    config = adapter.config
    factors = {_path_of(name) for name in adapter.tensors if factor_of(name)}
    stacks = {path for path in factors if names[path] in modules and kind_of(modules[names[path]]) is None}
    update: dict[str, Any] = {
        "target_modules": sorted(names[path] for path in factors - stacks) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _wholes(adapter, names),
    }
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        update["trainable_token_indices"] = {
            new: ids for old, new in names.items() for module, ids in tokens.items() if matches_end(old, module)
        }
    update |= _patterns(config, names, factors - stacks, stacks, modules)
    for field in config.by_tensor:
        if given := getattr(config, field):
            update[field] = {_tensor(name, names): value for name, value in given.items()}
    return config.model_copy(update=update)


def _wholes(adapter: AdapterFile, names: Mapping[str, str]) -> list[str] | None:
    """Each of `modules_to_save` by the paths that it stands for: what is saved may be a part of it."""
    found = set()
    for name in adapter.tensors:
        old = _path_of(name)
        for whole in adapter.config.modules_to_save or []:
            if match := re.match(rf"((?:.*\.)?{re.escape(whole)})((?:\..*)?)$", old):
                found.add(names[old].removesuffix(match[2]) if match[2] else names[old])
    return sorted(found) or None


def _patterns(
    config: AdapterConfig, names: Mapping[str, str], layers: set[str], stacks: set[str], modules: Modules
) -> dict[str, Any]:
    """Ranks, alphas and target parameters, each by its full name."""
    wanted = getattr(config, "target_parameters", None) or []
    parameters = {
        f"{old}.{name}": f"{names[old]}.{name}"
        for old in stacks
        for name in parameter_names(modules[names[old]])
        if any(matches_end(f"{old}.{name}", pattern) for pattern in wanted)
    }
    places = {old: names[old] for old in layers} | parameters
    update: dict[str, Any] = {"target_parameters": sorted(parameters.values()) or None} if wanted else {}
    for field, usual in config.by_module.items():
        if given := getattr(config, field):
            values = {new: pattern_value(given, old, getattr(config, usual)) for old, new in places.items()}
            update[field] = {re.escape(new): value for new, value in values.items()}
    return update


def _tensor(name: str, names: Mapping[str, str]) -> str:
    """A pattern that goes by the names of tensors (AdaLoRA's)."""
    path, dot, rest = name.rpartition(".")
    prefix = "base_model.model." if path.startswith("base_model.model.") and path not in names else ""
    return prefix + names.get(path.removeprefix(prefix), path.removeprefix(prefix)) + dot + rest
