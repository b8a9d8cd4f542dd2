"""`ensure_weight_tying`: what is tied to the input embedding stays tied while it is adapted, or trained whole."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.install import AdapterSet
from lowrank.adapters.kinds.embedding import EmbeddingKind
from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.methods.layer import LowRankLayer
from lowrank.adapters.methods.lora import LORA_A, LORA_B
from lowrank.adapters.modules import base_modules, submodule
from lowrank.adapters.token_rows import find_input_embedding, tied_to
from lowrank.adapters.whole_modules import WholeCopy
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_Found = TypeVar("_Found", bound=dict[str, nn.Module])


class _TiedLayer(nn.Module):
    """The embedding's adapter on a module that is tied to it: a head's W is the embedding's table, so ΔW is too."""

    replaces = False

    def __init__(self, source: LowRankLayer, kind: Kind) -> None:
        super().__init__()
        self.source, self.kind = source, kind

    def term(self, module: HostModule) -> LowRank:
        """The embedding's term, as this module's matrix sees it."""
        source = self.source
        if self.kind.looked_up:
            return source.term(module)
        dropout = source.dropout if source.training else 0.0
        factors = source.factors()
        return LowRank(factors["lora_B"].t(), factors["lora_A"].t(), source.scale, dropout=dropout)

    def output(self, module: HostModule, x: torch.Tensor) -> torch.Tensor:
        """The module's output with the embedding's term acting."""
        return self.kind.fused(module, x, self.term(module), getattr(module, "bias", None))

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the embedding's term adds to the module's own output y."""
        return self.kind.delta(module, x, y, self.term(module))

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """The same values once more, under the names of this module's own adapter, as in peft's files."""
        term = self.term(module)
        named = ((LORA_A, term.A), (LORA_B, term.B))
        return dict(self.kind.in_file(module, factor, values) for factor, values in named)

    def merge_into(self, module: HostModule) -> None:
        """The very sum that the embedding gets, so that the two can share it again."""
        self.source.merge_into(module)


class _TiedCopy(WholeCopy):
    """A trained copy of a module whose weight is that of the embedding's trained copy."""

    def __init__(self, module: HostModule, source: WholeCopy) -> None:
        super().__init__(module)
        self.module.weight = source.module.weight


def tied_group(model: nn.Module, config: AdapterConfig) -> tuple[str, list[str]] | None:
    """The input embedding and what is tied to it, where the config asks to keep them so; None where it does not."""
    if not getattr(config, "ensure_weight_tying", False):
        return None
    first = find_input_embedding(model)
    tied = [] if first is None else tied_to(base_modules(model), first)
    if first is None or not tied:
        warnings.warn("ensure_weight_tying is set, and nothing is tied to the model's input embedding")
        return None
    _check_tokens(config, [first, *tied])
    return first, tied


def _check_tokens(config: AdapterConfig, group: list[str]) -> None:
    wanted = getattr(config, "trainable_token_indices", None)
    if isinstance(wanted, dict):
        asked = {name: ids for name, ids in wanted.items() if any(f".{path}".endswith(f".{name}") for path in group)}
        if len({tuple(ids) for ids in asked.values()}) > 1:
            raise InputError(f"ensure_weight_tying: {', '.join(asked)} are tied, and their tokens differ")


def with_first(found: _Found, group: tuple[str, list[str]] | None, model: nn.Module) -> _Found:
    """Modules to adapt, or to save whole, with the embedding in the place of whatever is tied to it."""
    if group is None or not any(path in found for path in (group[0], *group[1])):
        return found
    kept = {path: module for path, module in found.items() if path not in group[1]}
    return type(found)({group[0]: submodule(model, group[0]), **kept})


def check_fields(config: AdapterConfig, first: str) -> None:
    """Raises InputError for what a head and an embedding cannot share."""
    init = getattr(config, "init_lora_weights", None)
    if config.method_name != "lora" or init not in _INITIALISATIONS:
        how = config.method_name if config.method_name != "lora" else init
        raise InputError(f"ensure_weight_tying: {first} and what is tied to it cannot share {how}")


def followers(model: nn.Module, adapter: str, group: tuple[str, list[str]] | None) -> dict[str, nn.Module]:
    """Layers for what is tied to the embedding, which the adapter has a layer on by now."""
    if group is None:
        return {}
    carried = submodule(model, group[0])._modules.get(AdapterSet.CHILD)
    source = carried.layers().get(adapter) if isinstance(carried, AdapterSet) else None
    modules: dict[str, HostModule] = {path: submodule(model, path) for path in group[1]}
    if isinstance(source, LowRankLayer) and isinstance(source.kind, EmbeddingKind):
        kinds = {path: kind_of(module) for path, module in modules.items()}
        return {path: _TiedLayer(source, kind) for path, kind in kinds.items() if kind is not None}
    if isinstance(source, WholeCopy):
        return {path: _TiedCopy(module, source) for path, module in modules.items()}
    return {}
