"""The factors of a module read from an adapter's file, as its method takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lowrank.adapters.methods.method import Matrix
from lowrank.adapters.registry import method_of
from lowrank.weights.files.adapter_file import AdapterFile


def flat_factors(adapter: AdapterFile, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A module's factors in float32, without a convolution's dimensions.

    Args:
        adapter: The adapter.
        names: Bare name -> name in the file.
    """
    sides = {factor.name: factor.side for factor in method_of(adapter.config).factors}
    return {bare: _flat(adapter.read(name).float(), sides.get(bare)) for bare, name in names.items()}


def shared_tensors(adapter: AdapterFile, matrices: Iterable[Matrix]) -> dict[str, torch.Tensor]:
    """What all modules of an adapter have in common: as its file has it, else made anew for these matrices."""
    method = method_of(adapter.config)
    held = {name: adapter.read(name).float() for name in method.shared if name in adapter.tensors}
    missing = set(method.shared) - held.keys()
    return {**method.shared_for(adapter.config, matrices), **held} if missing else held


def _flat(values: torch.Tensor, side: str | None) -> torch.Tensor:
    if side == "row":
        return values.flatten()
    return values if side is None else values.flatten(1)
