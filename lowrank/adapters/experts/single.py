"""Adapters on single experts ("experts.3.up_proj") of a model that holds all experts in one parameter.

Checkpoints hold one matrix for each expert and projection, and so did models before transformers 5; an adapter may name
these still. What they are rows of in the model's parameters is read from transformers' conversion mapping.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.experts.fused import ExpertFactors, ExpertsLayer
from lowrank.adapters.methods.lora import LoraConfig
from lowrank.adapters.modules import bare, base_modules, submodule
from lowrank.adapters.targeting.matching import matches_end
from lowrank.errors import InputError

_STACKS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
_NUMBERED = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True, slots=True)
class SinglePlace:
    """Where one expert's matrix lies.

    Attributes:
        path: Of the experts module.
        name: Of the matrix, after that path ("3.up_proj").
        parameter: The module's parameter (experts, ., .) that holds it.
        expert: Its index there.
        first, rows: Which of that expert's rows it is.
        width: How many columns it has.
    """

    path: str
    name: str
    parameter: str
    expert: int
    first: int
    rows: int
    width: int


class _SingleFactors(nn.ModuleDict):
    """Factors for some of the matrices in one parameter, by the matrix's name ("3/up_proj").

    Attributes:
        scale: 1: each matrix has its own.
    """

    scale = 1.0

    def __init__(self, experts: int, height: int, dropout: float) -> None:
        super().__init__()
        self.experts, self.height, self.dropout = experts, height, dropout
        self.places: dict[str, SinglePlace] = {}

    def add(self, place: SinglePlace, matrix: ExpertFactors) -> None:
        """Takes one more."""
        key = place.name.replace(".", "/")
        self.places[key] = place
        self[key] = matrix

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """left (experts, d1, R) and right (experts, R, d2), zeros where no adapter is."""
        if self.training and self.dropout:
            raise InputError("lora_dropout has no input to drop on single experts", fix="Train them with 0.")
        matrices = [(self.places[key], matrix) for key, matrix in self.items() if isinstance(matrix, ExpertFactors)]
        ranks: dict[int, int] = defaultdict(int)
        for place, matrix in matrices:
            ranks[place.expert] += matrix.lora_A.shape[0]
        like, width = matrices[0][1].lora_A, matrices[0][0].width
        left = like.new_zeros(self.experts, self.height, max(ranks.values()))
        right = like.new_zeros(self.experts, max(ranks.values()), width)
        used: dict[int, int] = defaultdict(int)
        for place, matrix in matrices:
            own_left, own_right = matrix.factors()
            k, r = used[place.expert], own_right.shape[0]
            left[place.expert, place.first : place.first + place.rows, k : k + r] = own_left * matrix.scale
            right[place.expert, k : k + r] = own_right
            used[place.expert] += r
        return left, right

    def in_file(self, prefix: str) -> dict[str, torch.Tensor]:
        """Under each matrix's own name, as for a module."""
        tensors: dict[str, torch.Tensor] = {}
        for key, matrix in self.items():
            assert isinstance(matrix, ExpertFactors)
            tensors |= matrix.in_file(f"{self.places[key].name}.")
        return tensors


def single_places(model: nn.Module) -> dict[str, SinglePlace]:
    """Every expert's matrices by the names that checkpoints have for them, without ".weight"."""
    inner = bare(model)
    if not isinstance(inner, PreTrainedModel):
        return {}
    converters = [c for c in get_model_conversion_mapping(inner) if isinstance(c, WeightConverter)]
    found: dict[str, SinglePlace] = {}
    for path, module in base_modules(model).items():
        for name, value in module._parameters.items():
            if value is not None and value.ndim == 3:
                found |= {f"{place.path}.{place.name}": place for place in _places(path, name, value, converters)}
    return found


def _places(path: str, name: str, value: torch.Tensor, converters: list[WeightConverter]) -> Iterator[SinglePlace]:
    for converter in converters:
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        target = converter.target_patterns[0]
        if (
            steps not in _STACKS
            or not matches_end(f"{path}.{name}", target)
            or value.shape[1] % len(converter.source_patterns)
        ):
            continue
        rows = value.shape[1] // len(converter.source_patterns)
        for at, source in enumerate(converter.source_patterns):
            own = source.removesuffix(".weight").removeprefix(f"{target.rpartition('.')[0]}.")
            if own.startswith("*."):
                for expert in range(value.shape[0]):
                    yield SinglePlace(
                        path, own.replace("*", str(expert), 1), name, expert, at * rows, rows, value.shape[2]
                    )


def find_single_experts(model: nn.Module, config: AdapterConfig) -> dict[str, SinglePlace]:
    """Which single experts the names in `target_modules` mean that no module of the model has.

    Raises:
        InputError: a field that does not fit an expert's matrix.
    """
    names = config.target_modules if isinstance(config.target_modules, list) else []
    numbered = [name for name in names if _NUMBERED.search(name)]
    if not numbered:
        return {}
    modules = base_modules(model)
    unknown = [name for name in numbered if not any(matches_end(path, name) for path in modules)]
    places = single_places(model) if unknown else {}
    found = {path: place for path, place in places.items() if any(matches_end(path, name) for name in unknown)}
    if found:
        _check_fields(config, next(iter(found)))
    return found


def without_single_experts(config: AdapterConfig, found: dict[str, SinglePlace]) -> AdapterConfig:
    """The config with the names of modules alone."""
    names = config.target_modules
    if not found or not isinstance(names, list):
        return config
    kept = [name for name in names if not any(matches_end(path, name) for path in found)]
    return config.model_copy(update={"target_modules": kept})


def single_experts_layers(
    model: nn.Module, config: AdapterConfig, found: dict[str, SinglePlace]
) -> dict[str, ExpertsLayer]:
    """A layer for each experts module, by its path."""
    layers: dict[str, ExpertsLayer] = {}
    for full, place in found.items():
        assert isinstance(config, LoraConfig)
        layer = layers.setdefault(place.path, ExpertsLayer())
        weight = getattr(submodule(model, place.path), place.parameter)
        if place.parameter not in layer:
            layer[place.parameter] = _SingleFactors(weight.shape[0], weight.shape[1], config.lora_dropout)
        r, scale = config.rank_and_scale(full)
        matrix = ExpertFactors(torch.Size((place.rows, place.width)), False, r, scale, weight)
        matrix.initialise(config.init_lora_weights, r)
        factors = layer[place.parameter]
        assert isinstance(factors, _SingleFactors)
        factors.add(place, matrix)
    return layers


def _check_fields(config: AdapterConfig, path: str) -> None:
    plain = isinstance(config, LoraConfig) and config.method_name == "lora" and not config.lora_bias
    if not plain or getattr(config, "init_lora_weights", None) not in (True, False, "gaussian"):
        raise InputError(
            f"{path} is one of the experts that this model holds in one parameter, and takes plain LoRA alone",
            fix="Take LoRA with init_lora_weights true or gaussian for it.",
        )
