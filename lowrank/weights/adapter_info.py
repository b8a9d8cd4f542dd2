"""What an adapter's files say: method, base, ranks, parameters, and how large its ΔW is, layer by layer."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.multihead import OUT_PROJ, OUT_PROJ_TWICE
from lowrank.adapters.registry import method_of
from lowrank.weights.arithmetic.factors import Product, norm
from lowrank.weights.files.adapter_file import AdapterFile, open_adapter
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.factor_values import flat_factors
from lowrank.weights.files.fingerprint import Fingerprint

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """An adapter in figures.

    Attributes:
        size: Bytes of the weights file.
        parameters: Values in it.
        modules: Last part of the modules' names -> how many carry factors.
        ranks: Rank -> how many modules have it.
        whole: Tensors that are no factors (whole modules, biases, token rows).
        norms: Module path -> ‖s·B·A‖; for DoRA without its magnitudes. Modules that cannot be measured without the
            base are not in it.
        layers: Layer number -> √Σ‖s·B·A‖² over its modules; None for what is in no layer.
    """

    path: Path
    config: AdapterConfig
    base: str | None
    fingerprint: Fingerprint | None
    quantization: dict[str, Any] | None
    size: int
    parameters: int
    modules: dict[str, int]
    ranks: dict[int, int]
    whole: list[str]
    norms: dict[str, float]
    layers: dict[int | None, float]


def summarise(path: str | Path) -> AdapterSummary:
    """Reads an adapter one module at a time.

    Raises:
        InputError: It is no adapter, is damaged, or holds NaN or infinity.
    """
    adapter = open_adapter(path)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    whole = []
    for name in adapter.tensors:
        if factor := factor_of(name):
            found[factor.path][factor.name] = name
        else:
            whole.append(name)
    fused = bool(getattr(adapter.config, "target_parameters", None))
    measured = {module: _measure(adapter, module, names, fused) for module, names in found.items()}
    norms = {module: size for module, (_, size) in measured.items() if size is not None}
    layers: dict[int | None, float] = defaultdict(float)
    for module, size in norms.items():
        number = _LAYER.search(f".{module}.")
        layers[int(number[1]) if number else None] += size**2
    return AdapterSummary(
        path=adapter.path,
        config=adapter.config,
        base=adapter.base,
        fingerprint=adapter.fingerprint,
        quantization=adapter.quantization,
        size=adapter.file.path.stat().st_size,
        parameters=sum(torch.Size(entry.shape).numel() for entry in adapter.tensors.values()),
        modules=dict(Counter(module.removesuffix(".base_layer").rpartition(".")[2] for module in found)),
        ranks=dict(sorted(Counter(rank for rank, _ in measured.values()).items())),
        whole=whole,
        norms=norms,
        layers={number: math.sqrt(square) for number, square in sorted(layers.items(), key=_none_last)},
    )


def _measure(adapter: AdapterFile, module: str, names: dict[str, str], fused: bool) -> tuple[int, float | None]:
    """The rank, and ‖s·B·A‖ where it can be known."""
    method, config = method_of(adapter.config), adapter.config
    if not {factor.name for factor in method.factors if factor.side != "row"} <= names.keys():
        return 0, None
    if fused and re.search(r"\.base_layer$|experts$", module):
        return method.rank(config, module), None  # how rows belong to experts depends on the base's parameters
    if method.of_base:
        return method.rank(config, module), None
    whole = module.removesuffix(f".{OUT_PROJ}")
    term = method.low_rank(flat_factors(adapter, names), method.scale(config, whole), None)
    A, B = term.A, term.B
    groups = max(1, A.shape[0] // max(1, B.shape[1]))  # of a convolution: each group's outputs have ranks of their own
    sizes = [norm(Product(*pair)) for pair in zip(A.chunk(groups), B.chunk(groups), strict=True)]
    times = OUT_PROJ_TWICE if whole != module else 1.0
    return A.shape[0], times * abs(term.scale) * math.hypot(*sizes)


def _none_last(item: tuple[int | None, float]) -> tuple[bool, int]:
    return item[0] is None, item[0] or 0
