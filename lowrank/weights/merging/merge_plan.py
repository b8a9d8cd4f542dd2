"""What each shard of a merged model will hold, and where every tensor of it comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lowrank.adapters.ties import Parting, Ties
from lowrank.errors import InputError
from lowrank.quantisers.decoder import Decoder
from lowrank.storage.tensorfile import CODES, TORCH_DTYPES, Entry
from lowrank.weights.files.adapter_file import shorten
from lowrank.weights.files.dequantise import Decoding
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.files.names import Placement
from lowrank.weights.merging.updates import Resized, Then, Update

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the output.

    Attributes:
        source: The base's tensor that it is made from, in the file `path`; None where the base has none.
        changes: The updates on the parts of it, with the places of the parts.
        decoder: Gives the base's values where its tensor is quantised, or is to be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    source: Entry | None
    changes: tuple[tuple[Placement, Update], ...] = ()
    decoder: Decoder | None = None

    @property
    def height(self) -> int:
        """How many rows to work on are one of dimension 0: experts' matrices are taken one below another."""
        return self.shape[1] if self._stacked else 1

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape in which rows are counted."""
        return (self.shape[0] * self.shape[1], self.shape[2]) if self._stacked else self.shape

    @property
    def _stacked(self) -> bool:
        return len(self.shape) == 3 and self.decoder is None and all(update.stacked for _, update in self.changes)

    @property
    def copied(self) -> bool:
        """Whether its bytes are the base's."""
        same = self.source is not None and self.dtype == self.source.dtype
        return same and not self.changes and self.decoder is None


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards of the output by file name, and what changes in the config."""

    shards: dict[str, list[Planned]]
    config: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the output's tensors."""
        sizes = (TORCH_DTYPES[t.dtype].itemsize * torch.Size(t.shape).numel() for t in self._tensors() if not t.copied)
        return sum(sizes) + sum(t.source.size for t in self._tensors() if t.copied and t.source is not None)

    def _tensors(self) -> list[Planned]:
        return [tensor for shard in self.shards.values() for tensor in shard]


def make_plan(base: ModelFolder, updates: dict[str, Update], dtype: torch.dtype | None, decoding: Decoding) -> Plan:
    """Lays the updates over the base's files.

    Args:
        base: The base.
        updates: By parameter name.
        dtype: Of the result's float tensors; None keeps the base's.
        decoding: How the base's tensors are read.

    Raises:
        InputError: An update's parameter is nowhere in the files, or in a form that cannot be merged into.
    """
    shards: dict[str, list[Planned]] = {}
    placed: set[str] = set()
    notes = list(decoding.notes)
    for file_name, file in base.files.items():
        shard = []
        for entry in file.entries.values():
            if entry.name in decoding.dropped:
                continue
            changes = _changes(entry, base.pieces[entry.name], updates)
            placed |= {piece.parameter for piece, _ in changes}
            decoder = decoding.decoders.get(entry.name)
            if decoder is None:
                shard.append(_planned(entry, file.path, changes, dtype))
            else:
                shard.append(_decoded(entry, file.path, changes, dtype, decoder))
        shards[file_name] = shard
    _refuse_missing(base, updates)
    config: dict[str, object] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    if base.quantization is not None:
        config["quantization_config"] = None
    rest = {name: update for name, update in updates.items() if name not in placed}
    parting = _untie(base, shards, updates, rest, dtype)
    if parting.flag_off:
        config["tie_word_embeddings"] = False
    if parting.targets:
        notes.append(
            "The base has one tensor for embedding and head; the adapter changes them apart, so both are written."
        )
    for name, update in rest.items():
        if update.shape is None:
            raise InputError(
                f"the base's files have no tensor for {name}, which the adapter changes", where=str(base.folder)
            )
        shards[next(iter(shards))].append(_new(name, update, base, dtype))
    return Plan(shards, config, notes + _made_up(updates))


def _refuse_missing(base: ModelFolder, updates: dict[str, Update]) -> None:
    """A head that neither has would be made up anew at every loading of the merged model."""
    model = base.skeleton
    if model.base_model is model:
        return
    has = {piece.parameter for pieces in base.pieces.values() for piece in pieces}
    has |= {name for name, update in updates.items() if update.shape is not None}
    has |= {name for pair in model.all_tied_weights_keys.items() if has & set(pair) for name in pair}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in has and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        raise InputError(
            f"neither base nor adapter holds {shorten(missing)}, which a {type(model).__name__} needs",
            where=str(base.folder),
            fix="In training they were made up and never saved. Train them whole (modules_to_save), or give the base "
            "that has them.",
        )


def _changes(entry: Entry, pieces: list[Placement], updates: dict[str, Update]) -> tuple[tuple[Placement, Update], ...]:
    if entry.name in updates and not any(piece.whole for piece in pieces):
        return ((Placement(entry.name, None, 0, entry.shape[0], 0), updates[entry.name]),)
    found = [(piece, updates[piece.parameter]) for piece in pieces if piece.parameter in updates]
    return tuple((piece, update if piece.expert is None else update.of_expert(piece.expert)) for piece, update in found)


def _planned(
    entry: Entry, path: Path, changes: tuple[tuple[Placement, Update], ...], dtype: torch.dtype | None
) -> Planned:
    for piece, _ in changes:
        if piece.obstacle is not None:
            raise InputError(
                f"{entry.name} reaches the model through {piece.obstacle}, and an adapter on {piece.parameter} "
                "cannot be merged into it on disk",
                fix="Load base and adapter, and merge in memory with lowrank.merge.",
            )
    if changes and entry.dtype not in FLOATS:
        raise InputError(f"{entry.name} has the dtype {entry.dtype}; an adapter is merged into {sorted(FLOATS)} only")
    code = CODES[dtype] if dtype is not None and entry.dtype in FLOATS else entry.dtype
    whole = next((update.shape for _, update in changes if update.shape is not None), entry.shape)
    if whole != entry.shape:
        changes = tuple((replace(piece, rows=whole[0]), update) for piece, update in changes)
    source = entry if whole[1:] == entry.shape[1:] else None
    return Planned(entry.name, code, whole, path, source, changes)


def _decoded(
    entry: Entry,
    path: Path,
    changes: tuple[tuple[Placement, Update], ...],
    dtype: torch.dtype | None,
    decoder: Decoder,
) -> Planned:
    """A quantised tensor becomes a dense one: in bf16, unless the file has it in a float dtype or `dtype` says more."""
    if resized := [update.shape for _, update in changes if update.shape not in (None, decoder.shape)]:
        raise InputError(f"{entry.name} is quantised as {list(decoder.shape)}, and the adapter has it as {resized[0]}")
    own = entry.dtype if entry.dtype in FLOATS and entry.shape == decoder.shape else "BF16"
    changes = tuple((replace(piece, rows=decoder.shape[0]), update) for piece, update in changes)
    return Planned(entry.name, own if dtype is None else CODES[dtype], decoder.shape, path, entry, changes, decoder)


def _new(name: str, update: Update, base: ModelFolder, dtype: torch.dtype | None) -> Planned:
    """A parameter that the base's files lack, a new classification head for example."""
    assert update.shape is not None
    file = next(iter(base.files.values()))
    floats = [entry.dtype for entry in file.entries.values() if entry.dtype in FLOATS]
    code = CODES[dtype] if dtype is not None else max(set(floats), key=floats.count, default="F32")
    piece = Placement(name, None, 0, update.shape[0], 0)
    return Planned(name, code, update.shape, file.path, None, ((piece, update),))


def _untie(
    base: ModelFolder,
    shards: dict[str, list[Planned]],
    updates: dict[str, Update],
    rest: dict[str, Update],
    dtype: torch.dtype | None,
) -> Parting:
    """Gives tied parameters that are changed apart a tensor each, out of `rest`; returns which those are."""
    pairs, broken = base.skeleton.all_tied_weights_keys, set()
    for pair in pairs.items():
        changed = [updates[name] for name in pair if name in updates]
        if not all(update.before_tie is update for update in changed):
            broken.add(pair[0])
        elif any(name in updates for name in _stored(base, shards, pair)):
            for name in pair:
                rest.pop(name, None)  # what both share is written once
    parting = Ties(base.skeleton).parting(broken)
    for source in sorted({pairs[target] for target in parting.targets}):
        group = [source, *(target for target in pairs if pairs[target] == source)]
        stored = _stored(base, shards, group)
        if not stored:
            continue
        name, (shard, tensor) = next(iter(stored.items()))
        assert tensor.source is not None
        shared = updates[name].before_tie if name in updates else None
        for other in group:  # transformers leaves those apart that the files hold apart
            if other in stored or other not in {source, *parting.targets}:
                continue
            update = rest.pop(other, shared)
            changes = () if update is None else ((Placement(other, None, 0, tensor.source.shape[0], 0), update),)
            shard.append(replace(_planned(tensor.source, tensor.path, changes, dtype), name=other))
    return parting


def _stored(
    base: ModelFolder, shards: dict[str, list[Planned]], tied: list[str] | tuple[str, str]
) -> dict[str, tuple[list[Planned], Planned]]:
    """Which of some tied parameters the files hold, and where."""
    return {
        piece.parameter: (shard, tensor)
        for shard in shards.values()
        for tensor in shard
        for piece in base.pieces.get(tensor.name, [])
        if piece.parameter in tied
    }


def _made_up(updates: dict[str, Update]) -> list[str]:
    """What is to be said about rows that neither the base nor the adapter has."""
    names = [name for name, update in updates.items() if _grows(update)]
    if not names:
        return []
    return [
        f"Neither base nor adapter holds rows of the new tokens for {', '.join(names)}: they are the mean of the "
        "others, as resize_token_embeddings makes them."
    ]


def _grows(update: Update) -> bool:
    if isinstance(update, Then):
        return _grows(update.parts[0])
    return isinstance(update, Resized) and update.shape[0] > update.stored
