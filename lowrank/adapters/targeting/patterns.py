"""Every pattern of every field names something of the model, or is refused with the nearest right spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.targeting.matching import matches_end, matches_pattern
from lowrank.errors import InputError


def listed(value: Iterable[str] | str | None) -> list[str]:
    """One name or several as a list."""
    return [] if not value else [value] if isinstance(value, str) else list(value)


def layer_number(path: str, config: AdapterConfig) -> int | None:
    """The number of the layer that a path lies in, by the config's layers_pattern; None outside of layers."""
    for pattern in listed(config.layers_pattern) or [r"[^.]*"]:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(match.group(1))
    return None


def check_patterns(config: AdapterConfig, modules: Mapping[str, nn.Module], adapted: Collection[str]) -> None:
    """Raises InputError for entries of the fields beside target_modules that mean nothing on this model.

    Args:
        config: The adapter's.
        modules: All of the model's, by path.
        adapted: The paths of the modules and parameters that the adapter goes to.
    """
    if idle := [f"{field}: {key!r} {hint}" for field, key, hint in _idle_patterns(config, modules, adapted)]:
        raise InputError("; ".join(idle), fix="Correct it, or leave it out.")


def _idle_patterns(
    config: AdapterConfig, modules: Mapping[str, nn.Module], adapted: Collection[str]
) -> list[tuple[str, object, str]]:
    """Those entries: the field, the entry, and what is wrong with it."""
    idle: list[tuple[str, object, str]] = []
    for field in config.by_module:
        idle += [(field, key, hint) for key in getattr(config, field) if (hint := _idle_key(field, key, adapted))]
    for field, factor in config.by_tensor.items():
        known = {f"{path}.{factor}" for path in adapted}
        keys = [key for key in getattr(config, field) or {} if key.removeprefix("base_model.model.") not in known]
        idle += [(field, key, f"is no adapted module; {_nearest(key, known)}") for key in keys]
    return idle + _idle_exclusions(config, modules) + _idle_layers(config, modules, adapted)


def without_missing(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> AdapterConfig:
    """The config without names of modules that the model does not have.

    A field of which no name would be left keeps them all, for the error that they deserve.
    """
    update: dict[str, object] = {}
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field)
        if isinstance(names, list):
            update[field] = [name for name in names if any(matches_end(path, name) for path in modules)]
    return config.model_copy(update={field: value or getattr(config, field) for field, value in update.items()})


def without_idle(config: AdapterConfig, modules: Mapping[str, nn.Module], adapted: Collection[str]) -> AdapterConfig:
    """The config of an adapter from a file, without entries that mean nothing on this model.

    Other programs write them and pass over them. That the file's tensors all have a place is proved when they are
    filled in.
    """
    idle = {(field, str(key)) for field, key, _ in _idle_patterns(config, modules, adapted)}
    update: dict[str, object] = {}
    for field in {field for field, _ in idle}:
        value = getattr(config, field)
        if isinstance(value, Mapping):
            update[field] = {key: each for key, each in value.items() if (field, key) not in idle}
        elif isinstance(value, list):
            update[field] = [each for each in value if (field, str(each)) not in idle] or None
        else:
            update[field] = None
    return config.model_copy(update=update)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint: what the name may have meant, or all that there is."""
    return _nearest(name, sorted({path.rpartition(".")[2] for path in known if not path.rpartition(".")[2].isdigit()}))


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = near or difflib.get_close_matches(name.rpartition(".")[2], names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names[:12])}"


def _idle_key(field: str, key: str, adapted: Collection[str]) -> str | None:
    try:
        re.compile(key)
    except re.error as error:
        return f"is not a regular expression ({error})"
    if any(matches_pattern(path, key) for path in adapted):
        return None
    return f"matches no adapted module; {nearest(key, adapted)}"


def _idle_exclusions(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> list[tuple[str, object, str]]:
    """A block's name excludes nothing: what is adapted lies inside of it."""
    given, whole = config.exclude_modules, isinstance(config.exclude_modules, str)
    holding = [path for path, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    idle: list[tuple[str, object, str]] = []
    for key in listed(given):
        matching = [path for path in modules if (re.fullmatch(key, path) if whole else matches_end(path, key))]
        if not matching:
            idle.append(("exclude_modules", key, f"matches no module; {nearest(key, modules)}"))
        elif not set(matching) & set(holding):
            hint = f"matches {matching[0]}, which holds only other modules, and these stay; to leave them all out, give"
            idle.append(("exclude_modules", key, rf"{hint} the expression '.*\b{re.escape(key)}\..*'"))
    return idle


def _idle_layers(
    config: AdapterConfig, modules: Mapping[str, nn.Module], adapted: Collection[str]
) -> list[tuple[str, object, str]]:
    if config.layers_to_transform is None:
        return []
    given = config.layers_to_transform
    numbers = given if isinstance(given, list) else [given]
    reached = {layer_number(path, config) for path in adapted}
    layers = sorted({number for path in modules if (number := layer_number(f"{path}.", config)) is not None})
    there = f"the layers are {layers[0]} to {layers[-1]}" if layers else "no layer has a number there"
    idle: list[tuple[str, object, str]] = [
        ("layers_to_transform", number, f"is a layer with no adapted module; {there}")
        for number in numbers
        if number not in reached
    ]
    for pattern in listed(config.layers_pattern):
        only = config.model_copy(update={"layers_pattern": pattern})
        if not any(layer_number(path, only) in numbers for path in adapted):
            lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
            idle.append(("layers_pattern", pattern, f"stands before no adapted layer; {nearest(pattern, lists)}"))
    return idle
