"""What adapters hold besides factors, composed: whole modules, trained biases, single tokens, `lora_bias`'s own.

A value saved whole is W + δ, and the weighted sum of the effects is W + Σ wᵢδᵢ. Without the base that is known where
the weights of those that hold it sum to 1: Σ wᵢ(W + δᵢ). One adapter with weight 1 is the common case. What `lora_bias`
adds is a sum.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.methods.lora import LORA_BIAS
from lowrank.adapters.registry import method_of
from lowrank.errors import InputError
from lowrank.weights.files.adapter_file import TOKENS, AdapterFile
from lowrank.weights.files.factor_names import factor_of

_ADDED = f".{LORA_BIAS}"
Held = tuple[AdapterFile, str, float]


@dataclass(frozen=True, slots=True)
class Rest:
    """The composed tensors that are no factors, and the config's fields that go with them."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


def rest_of(adapter: AdapterFile) -> frozenset[str]:
    """The tensors that are no factors."""
    return frozenset(name for name in adapter.tensors if not factor_of(name))


def compose_rest(files: Sequence[AdapterFile], weights: Sequence[float], shapes: dict[str, int]) -> Rest:
    """Everything but the factors.

    Args:
        files: The adapters.
        weights: One for each.
        shapes: Path of every module with factors -> the rows of its B.

    Raises:
        InputError: A value is not known without the base, or has no place in the new adapter.
    """
    holders: dict[str, list[Held]] = defaultdict(list)
    for file, weight in zip(files, weights, strict=True):
        for name in rest_of(file):
            holders[name.replace(".base_layer.", ".")].append((file, name, weight))
    tensors: dict[str, torch.Tensor] = {}
    tokens: dict[str, dict[int, list[tuple[torch.Tensor, float, AdapterFile]]]] = defaultdict(lambda: defaultdict(list))
    for name, held in holders.items():
        if name.endswith(_ADDED):
            added = [_scale(file, name) * weight * file.read(own).float() for file, own, weight in held]
            tensors[name] = torch.stack(added).sum(0)
        elif name.endswith(TOKENS):
            for file, own, weight in held:
                for token, row in zip(_tokens(file.config, name), file.read(own), strict=True):
                    tokens[name][token].append((row, weight, file))
        else:
            values = [(file.read(own), weight, file) for file, own, weight in held]
            path, _, leaf = name.rpartition(".")
            place = f"{path}.base_layer.{leaf}" if path in shapes else name
            tensors[place] = _average(name, values)
    fields = _fields(files, tokens)
    for name, rows in tokens.items():
        tensors[name] = torch.stack([_average(f"token {token} of {name}", held) for token, held in rows.items()])
    _check_biases(files, tensors, shapes)
    if fields.get("lora_bias"):
        for path, rows in shapes.items():
            tensors.setdefault(f"{path}{_ADDED}", torch.zeros(rows))
    return Rest(tensors, fields)


def _average(name: str, held: list[tuple[torch.Tensor, float, AdapterFile]]) -> torch.Tensor:
    if len(held) == 1 and held[0][1] == 1.0:
        return held[0][0]
    if not math.isclose(sum(weight for _, weight, _ in held), 1.0, rel_tol=1e-6):
        told = ", ".join(f"{weight:g} for {file.path}" for _, weight, file in held)
        raise InputError(
            f"{name} is saved whole, with the weights {told}: without the base, its weighted sum is known only where "
            "they sum to 1",
            fix="Choose such weights, or merge the adapters into their base one after another.",
        )
    if len({value.shape for value, _, _ in held}) > 1:
        raise InputError(f"the adapters do not fit one another: {name} has different shapes")
    total = torch.stack([value.double() * weight for value, weight, _ in held]).sum(0)
    return total.to(held[0][0].dtype)


def _tokens(config: AdapterConfig, name: str) -> list[int]:
    wanted = getattr(config, "trainable_token_indices", None)
    if isinstance(wanted, dict):
        path = name.removesuffix(TOKENS)
        wanted = next((ids for module, ids in wanted.items() if f".{path}".endswith(f".{module}")), None)
    if wanted is None:
        raise InputError(f"the config names no tokens for {name}")
    return wanted


def _fields(files: Sequence[AdapterFile], tokens: dict[str, Any]) -> dict[str, Any]:
    configs = [file.config for file in files]
    whole = {name for config in configs for name in config.modules_to_save or []}
    biases = {config.bias for config in configs} - {"none"}
    if len(biases) > 1:
        raise InputError("one adapter trains all biases and another those of its modules; they cannot become one")
    fields: dict[str, Any] = {"modules_to_save": sorted(whole) or None, "bias": biases.pop() if biases else "none"}
    if tokens:
        fields["trainable_token_indices"] = {name.removesuffix(TOKENS): list(rows) for name, rows in tokens.items()}
    if any(getattr(config, "lora_bias", False) for config in configs):
        fields["lora_bias"] = True
    return fields


def _check_biases(files: Sequence[AdapterFile], tensors: dict[str, torch.Tensor], shapes: dict[str, int]) -> None:
    """A file that trains biases holds those of all its modules; the base's own are not known here."""
    if all(file.config.bias == "none" for file in files):
        return
    own = [{found.path for name in file.tensors if (found := factor_of(name))} for file in files]
    without = {path for file, paths in zip(files, own, strict=True) if file.config.bias != "none" for path in paths}
    if lacking := sorted(shapes.keys() - without):
        raise InputError(
            f"one adapter trains biases, and only another has {lacking[0]}: its bias is the base's, not known here",
            fix="Compose adapters on the same modules, or merge them into their base one after another.",
        )


def _scale(file: AdapterFile, name: str) -> float:
    if not getattr(file.config, "lora_bias", False):
        raise InputError(f"{name} is unexpected in an adapter of this config", where=str(file.path))
    return method_of(file.config).scale(file.config, name.removesuffix(_ADDED))
