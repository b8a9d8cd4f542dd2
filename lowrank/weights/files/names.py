"""Where a file's tensor belongs in the model: transformers' conversion mappings, read as pieces of parameters.

Mostly a tensor is one whole parameter under the same name. In some architectures a file holds one matrix per expert
where the model holds all experts in one parameter, or a fused matrix where the model holds three. Merging needs
to know which rows of which parameter a file's tensor is; that is a `Placement`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Rows of a file's tensor that are rows of a parameter.

    Attributes:
        parameter: The parameter's name in the model.
        expert: Its index in the parameter's first dimension, where the file holds one matrix per expert.
        first: The first of the parameter's rows.
        rows: How many rows.
        at: Where they begin in the file's tensor.
        whole: Whether tensor and parameter are the same, but for the name.
        obstacle: What transformers does to the tensor beyond placing rows; such a piece cannot be merged into.
    """

    parameter: str
    expert: int | None
    first: int
    rows: int
    at: int
    whole: bool = False
    obstacle: str | None = None


def find_pieces(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> dict[str, list[Placement]]:
    """The pieces of every tensor of a checkpoint; tensors that the model has no place for have none.

    Args:
        model: The architecture, on the meta device.
        shapes: Tensor names in the files and their shapes.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    pieces: dict[str, list[Placement]] = {name: [] for name in shapes}
    groups: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key not in state:
            continue
        if pattern is None:
            pieces[name] = [_whole(key, shapes[name])]
        else:
            groups[key, id(by_pattern[pattern])][pattern].append(name)
    by_id = {id(converter): converter for converter in converters}
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for (key, converter), names in groups.items():
        pieces.update(_converted(key, by_id[converter], names, shapes, sizes))
    return pieces


def _whole(key: str, shape: Shape) -> Placement:
    return Placement(key, None, 0, shape[0] if shape else 1, 0, whole=True)


def _converted(
    key: str,
    converter: WeightConverter,
    names: Mapping[str, list[str]],
    shapes: Mapping[str, Shape],
    sizes: Mapping[str, Shape],
) -> dict[str, list[Placement]]:
    """The pieces of the tensors that one converter turns into the parameter `key` (and its siblings)."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    ordered = [(pattern, name) for pattern in converter.source_patterns for name in names.get(pattern, [])]
    match operations:
        case [("MergeModulelist", 0)] | [("MergeModulelist", 0), ("Concatenate", 1)]:
            return _stacked(key, converter.source_patterns, names, shapes)
        case [("Concatenate", 0)]:
            return _concatenated(key, [name for _, name in ordered], shapes)
        case [("Chunk" | "Split", 0)] if len(ordered) == 1:
            targets = [key.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
            return _split(targets, ordered[0][1], sizes)
    obstacle = " and ".join(name for name, _ in operations)
    return {name: [Placement(key, None, 0, 0, 0, obstacle=obstacle)] for _, name in ordered}


def _stacked(
    key: str, patterns: list[str], names: Mapping[str, list[str]], shapes: Mapping[str, Shape]
) -> dict[str, list[Placement]]:
    """One matrix per expert (and per projection) in the files, (experts, rows, in) in the model."""
    pieces, first = {}, 0
    for pattern in patterns:
        members = names.get(pattern, [])
        for expert, name in enumerate(members):
            pieces[name] = [Placement(key, expert, first, shapes[name][0], 0)]
        first += shapes[members[0]][0] if members else 0
    return pieces


def _concatenated(key: str, names: list[str], shapes: Mapping[str, Shape]) -> dict[str, list[Placement]]:
    """Several tensors in the files, one under another in the model."""
    pieces, first = {}, 0
    for name in names:
        pieces[name] = [Placement(key, None, first, shapes[name][0], 0)]
        first += shapes[name][0]
    return pieces


def _split(targets: list[str], name: str, sizes: Mapping[str, Shape]) -> dict[str, list[Placement]]:
    """One tensor in the files, several parameters in the model."""
    pieces, at = [], 0
    for target in targets:
        pieces.append(Placement(target, None, 0, sizes[target][0], at))
        at += sizes[target][0]
    return {name: pieces}
