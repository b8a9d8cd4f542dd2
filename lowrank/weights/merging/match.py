"""An adapter's tensors laid over a base: which parameter each changes, and how; everything that does not fit, at once.

Kinds of tensor in peft's files: the factors of a module or of fused experts (a low-rank update), whole parameters
(`modules_to_save`, trained biases, resized embeddings), and single rows of an embedding (trained tokens).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.experts.fused import expert_factors, is_transposed, name_in_file
from lowrank.adapters.kinds.kind import HostModule, is_multihead
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.methods.layer import matrix_of, merge_obstacle
from lowrank.adapters.methods.lora import LORA_A, LORA_B, LORA_BIAS, Lora
from lowrank.adapters.methods.method import Matrix
from lowrank.adapters.multihead import OUT_PROJ, OUT_PROJ_TWICE
from lowrank.adapters.registry import method_of
from lowrank.adapters.targeting.parameters import find_parameters
from lowrank.adapters.targeting.targets import find_targets
from lowrank.adapters.targeting.uncalled import Calls
from lowrank.adapters.token_rows import find_token_places
from lowrank.adapters.tying import tied_group
from lowrank.errors import InputError
from lowrank.storage.tensorfile import Entry, TensorFile
from lowrank.weights.files.adapter_file import TOKENS, AdapterFile, shorten
from lowrank.weights.files.expert_layout import is_turned
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.factor_values import flat_factors, shared_tensors
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.files.vocabulary import mean_row, padded_rows, tied_tokens, vocabulary_ends
from lowrank.weights.merging.updates import (
    ExpertsUpdate,
    Loaded,
    LowRankUpdate,
    Replacement,
    Resized,
    RowReplacement,
    Shift,
    Then,
    Update,
)

_BIAS = f".{LORA_BIAS}"
_LORA = {factor.name for factor in Lora.factors}
_HELD = 4  # modules whose factors stay in memory: threads work on neighbouring blocks


def find_updates(adapter: AdapterFile, base: ModelFolder) -> dict[str, Update]:
    """The update of every parameter that the adapter changes, by the parameter's name in the model.

    An adapter on single experts (as transformers 4 had them) names tensors that only the base's files have; its
    updates go by the names in the files.

    Raises:
        InputError: Tensors that are missing, unexpected or misshapen: all of them, by name.
    """
    return _Fit(adapter, base).run()


class _Fit:
    def __init__(self, adapter: AdapterFile, base: ModelFolder) -> None:
        self.adapter, self.config, self.base = adapter, adapter.config, base
        self.method = method_of(adapter.config)
        self.modules = dict(base.skeleton.named_modules())
        self.parameters = {name: tuple(tensor.shape) for name, tensor in base.skeleton.state_dict().items()}
        self.stored = {entry.name: entry.shape for file in base.files.values() for entry in file.entries.values()}
        self.vocabulary = self._vocabulary()
        self.problems: list[str] = []
        self.updates: dict[str, Update] = {}
        self.load = lru_cache(_HELD)(self._load)
        self.read_experts = lru_cache(_HELD)(self._read_experts)

    def run(self) -> dict[str, Update]:
        factors: dict[str, dict[str, str]] = defaultdict(dict)
        tokens, shifts = [], []  # each after what may replace that which it changes
        for name in self.adapter.tensors:
            if factor := factor_of(name):
                factors[factor.path][factor.name] = name
            elif name in self.method.shared:
                continue
            elif name.endswith(_BIAS):
                shifts.append(name)
            elif name.endswith(TOKENS):
                tokens.append(name)
            else:
                self._whole(name)
        self._resized()
        for name in sorted(set(tokens) - tied_tokens(self.base.skeleton, self.adapter)):
            self._token_rows(name.removesuffix(TOKENS), name)
        self._tied()
        self._lacking(factors)
        self._experts(factors)
        for path, names in factors.items():
            self._low_rank(path, names)
        self._kept_tied()
        for name in shifts:
            self._shift(name.removesuffix(_BIAS), name)
        if self.problems:
            raise InputError(
                f"the adapter does not fit the base {self.base.folder}: {shorten(self.problems, 20)}",
                where=str(self.adapter.path),
            )
        return self.updates

    def _low_rank(self, path: str, names: dict[str, str]) -> None:
        if path.endswith(f".{OUT_PROJ}") or is_multihead(self.modules.get(path, nn.Identity())):
            self._attention(path, names)
            return
        module, stored = self.modules.get(path), self.stored.get(f"{path}.weight", ())
        kind = None if module is None else kind_of(module)
        single = module is None and len(stored) == 2
        if (module is None or kind is None) and not single:
            self.problems.append(f"{path} is no module of the base that an adapter fits")
            return
        if module is not None and (obstacle := merge_obstacle(module)):
            self.problems.append(f"{path} cannot be merged: {obstacle}")
            return
        needed = {factor.name for factor in self.method.factors}
        if names.keys() != needed:
            self.problems.append(f"{path} lacks or has too many of {sorted(needed)}: {sorted(names)}")
            return
        matrix = Matrix(path, stored[0], stored[1]) if module is None or kind is None else matrix_of(path, module, kind)
        if not self._sizes_fit(matrix, names):
            return
        load = partial(self.load, matrix, tuple(sorted(names.items())), 1.0)
        transposed = isinstance(module, Conv1D | nn.Embedding)
        self._add(f"{path}.weight", LowRankUpdate(self.config, matrix, load, transposed))

    def _sizes_fit(self, matrix: Matrix, names: dict[str, str]) -> bool:
        """Whether a module's tensors are of W's sizes, and of the rank that the config says."""
        found = {bare: self.adapter.tensors[name].shape for bare, name in names.items()}
        first = self.method.factors[0].name
        r = found[first][0] if found[first] else 0
        try:
            wanted = self.method.shapes(self.config, matrix, r)
        except InputError as error:
            self.problems.append(error.what)
            return False
        if any(torch.Size(shape).numel() != torch.Size(wanted[bare]).numel() for bare, shape in found.items()):
            told = ", ".join(f"{names[bare]} {list(shape)}" for bare, shape in found.items())
            self.problems.append(f"{matrix.path} has W ({matrix.out}, {matrix.into}), which does not go with {told}")
            return False
        if r != (expected := self.method.rank(self.config, matrix.path)):
            self.problems.append(f"{names[first]} has rank {r}, and the config gives {matrix.path} {expected}")
            return False
        return True

    def _attention(self, path: str, names: dict[str, str]) -> None:
        """One of the two matrices of torch's attention."""
        whole, outer = path.removesuffix(f".{OUT_PROJ}"), path.endswith(f".{OUT_PROJ}")
        module: HostModule = self.modules.get(whole)
        shapes = {bare: self.adapter.tensors[name].shape for bare, name in names.items()}
        if module is None or not is_multihead(module) or module.in_proj_weight is None or names.keys() != _LORA:
            self.problems.append(f"{path} is no attention of the base with one width, or has not {_LORA}")
            return
        matrix = Matrix(whole, (1 if outer else 3) * module.embed_dim, module.embed_dim)
        out, into = matrix.out, matrix.into
        rank = self.method.rank(self.config, whole)
        if shapes != {"lora_A": (rank, into), "lora_B": (out, rank)}:
            self.problems.append(f"{path} has W ({out}, {into}), which at rank {rank} does not go with {shapes}")
            return
        times = OUT_PROJ_TWICE if outer else 1.0
        load = partial(self.load, matrix, tuple(sorted(names.items())), times)
        key = f"{whole}.out_proj.weight" if outer else f"{whole}.in_proj_weight"
        self._add(key, LowRankUpdate(self.config, matrix, load, transposed=False, times=times))

    def _lacking(self, factors: Mapping[str, object]) -> None:
        """Modules that the config's patterns name and the file holds nothing for."""
        try:
            targets = find_targets(self.base.skeleton, self.config, Calls(self.base.skeleton)).modules
        except InputError:  # single experts, that only the files have
            return
        outer = {f"{path}.{OUT_PROJ}" for path, module in targets.items() if is_multihead(module)}
        lacking = sorted((targets.keys() | outer) - factors.keys())
        self.problems += [f"{path} is to be adapted, and the file has no factors for it" for path in lacking]

    def _shift(self, path: str, name: str) -> None:
        """`lora_bias`: what B's bias adds to the module's own."""
        key, shape = f"{path}.bias", self.adapter.tensors[name].shape
        if not getattr(self.config, "lora_bias", False):
            self.problems.append(f"{name} is unexpected")
        elif key not in self.parameters:
            self.problems.append(f"{path} cannot be merged: lora_bias trained a bias, and it has none")
        elif shape != self.parameters[key]:
            self.problems.append(f"{name} is {list(shape)}, and the base's bias is {list(self.parameters[key])}")
        else:
            self._add(key, Shift(partial(self.adapter.read, name), self.method.scale(self.config, path)))

    def _load(self, matrix: Matrix, names: tuple[tuple[str, str], ...], times: float) -> Loaded:
        tensors = {**flat_factors(self.adapter, dict(names)), **self.shared}
        scale = times * self.method.scale(self.config, matrix.path)
        return Loaded(tensors, self.method.low_rank(tensors, scale, matrix))

    @cached_property
    def shared(self) -> dict[str, torch.Tensor]:
        """What all modules have in common."""
        paths = {factor.path for name in self.adapter.tensors if (factor := factor_of(name))}
        modules = {path: self.modules[path] for path in paths & self.modules.keys()}
        kinds = {path: kind_of(module) for path, module in modules.items()}
        matrices = [matrix_of(path, modules[path], kind) for path, kind in kinds.items() if kind is not None]
        return shared_tensors(self.adapter, matrices)

    def _experts(self, factors: dict[str, dict[str, str]]) -> None:
        """Takes the tensors of `target_parameters` out of `factors`."""
        for path, parameters in find_parameters(self.base.skeleton, self.config)[0].items():
            for name in parameters:
                nested = f"{path}.{name_in_file(parameters, name)}".rstrip(".")
                names = factors.pop(nested, {})
                if names.keys() == _LORA:
                    self._one_of_experts(path, name, names["lora_A"], names["lora_B"])
                else:
                    self.problems.append(f"{nested} lacks lora_A or lora_B for {name}")

    def _one_of_experts(self, path: str, name: str, name_A: str, name_B: str) -> None:
        if f"{path}.{name}" not in self.parameters:
            self.problems.append(f"{path}.{name} is parametrised, and can be merged in memory alone")
            return
        shape = self.parameters[f"{path}.{name}"]
        experts = shape[0] if len(shape) == 3 else 1
        full = f"{path}.{name}"
        r, scale = self.method.rank(self.config, full), self.method.scale(self.config, full)
        found = self.adapter.tensors[name_A].shape, self.adapter.tensors[name_B].shape
        transposed = is_turned(shape, is_transposed(self.modules[path]), experts * r, found, self.adapter.before_turn)
        if transposed is None:
            told = f"{name_A} {list(found[0])}, {name_B} {list(found[1])}"
            self.problems.append(f"{path}.{name} is {list(shape)}, which at rank {r} does not go with {told}")
            return
        load = partial(self.read_experts, name_A, name_B, experts, transposed)
        self._add(f"{path}.{name}", ExpertsUpdate(load, scale, expert=0 if len(shape) == 2 else None))

    def _read_experts(
        self, name_A: str, name_B: str, experts: int, transposed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = self.adapter.read(name_A).float(), self.adapter.read(name_B).float()
        left, right = expert_factors(A, B, experts, transposed)
        return left.contiguous(), right.contiguous()

    def _whole(self, name: str) -> None:
        key = name.replace(".base_layer.", ".")
        resized, trained = key in self.vocabulary, self._trained_whole(key)
        if key not in self.parameters or not (resized or trained):
            self.problems.append(f"{name} is unexpected")
            return
        shape, wanted = self.adapter.tensors[name].shape, self.parameters[key]
        if shape != wanted:
            self.problems.append(f"{name} is {list(shape)}, and the base has {list(wanted)}")
            return
        rows: Callable[[int, int], torch.Tensor] = partial(self.adapter.read_rows, name)
        self._add(key, Replacement(rows, shape, tied=not trained))

    def _trained_whole(self, key: str) -> bool:
        path = key.rpartition(".")[0]
        wholes = self.config.modules_to_save or []
        inside = any(re.match(rf"(^|.*\.){re.escape(whole)}($|\.)", path) for whole in wholes)
        return inside or (key.endswith("bias") and self.config.bias != "none")

    def _vocabulary(self) -> set[str]:
        """The parameters with a row for each token: an adapter's file may hold them whole, resized."""
        ends = vocabulary_ends(self.base.skeleton)
        return {f"{path}.{name}" for path in ends for name in ("weight", "bias")} & self.parameters.keys()

    def _resized(self) -> None:
        """The base's tables of tokens in the size that the adapter was trained with."""
        for file in self.base.files.values():
            for entry in file.entries.values():
                for piece in self.base.pieces[entry.name]:
                    if piece.whole and entry.shape != self.parameters[piece.parameter]:
                        self._resize(piece.parameter, file, entry)

    def _resize(self, key: str, file: TensorFile, entry: Entry) -> None:
        wanted = self.parameters[key]
        if key in self.updates or self.base.sizes.vocabulary is None:
            return
        if entry.shape[:-1] == wanted[:-1] and len(wanted) == 2:  # BART's bias on its logits
            self.updates[key] = Replacement(partial(padded_rows, file, entry, wanted[1]), wanted, tied=True)
            return
        if entry.shape[1:] != wanted[1:]:
            self.problems.append(f"{key} cannot be brought from {list(entry.shape)} to {list(wanted)} on disk")
            return
        self.updates[key] = Resized(wanted, entry.shape[0], lru_cache(1)(lambda: mean_row(file, entry)))

    def _tied(self) -> None:
        """What a resized table shares with one that is tied to it, both have."""
        for pair in self.base.skeleton.all_tied_weights_keys.items():
            changed = [self.updates[name] for name in pair if name in self.updates]
            shared = [update.before_tie for update in changed if update.shape is not None]
            known = sorted(filter(None, shared), key=lambda u: (isinstance(u, Then), not isinstance(u, Resized)))
            if self.base.sizes.vocabulary is None or not known:
                continue
            for name in pair:
                own = self.updates.get(name)
                if own is None or own.before_tie is own:
                    self.updates[name] = known[-1]

    def _kept_tied(self) -> None:
        """`ensure_weight_tying`: the embedding's update is that of all that is tied to it."""
        group = tied_group(self.base.skeleton, self.config)
        update = None if group is None else self.updates.get(f"{group[0]}.weight")
        if group is None or not isinstance(update, LowRankUpdate | Replacement):
            return
        stored = {piece.parameter for pieces in self.base.pieces.values() for piece in pieces}
        for path in group[1]:
            self.updates.pop(f"{path}.weight", None)
            for mine, its in ((LORA_A.in_file, LORA_B.on_table), (LORA_B.in_file, LORA_A.on_table)):
                pair = f"{path}.{mine}", f"{group[0]}.{its}"
                if set(pair) <= self.adapter.tensors.keys() and not self._transposed(*pair):
                    self.problems.append(f"{pair[0]} is tied to {pair[1]}, and not its values")
        for name in {f"{path}.weight" for path in group[1]} & stored | {f"{group[0]}.weight"}:
            self.updates[name] = replace(update, tied=True)

    def _transposed(self, name: str, other: str) -> bool:
        return torch.equal(self.adapter.read(name), self.adapter.read(other).t())

    def _token_rows(self, path: str, name: str) -> None:
        key, place = f"{path}.weight", find_token_places(self.base.skeleton, self.config).get(path)
        if place is None or place.obstacle is not None:
            self.problems.append(
                f"{name} is unexpected" if place is None else f"{path} cannot be merged: {place.obstacle}"
            )
            return
        indices = place.tokens
        rows, width = self.parameters[key]
        if self.adapter.tensors[name].shape != (len(indices), width) or not all(0 <= i < rows for i in indices):
            self.problems.append(f"{name} is not ({len(indices)}, {width}), or its tokens are not below {rows}")
            return
        update = RowReplacement(torch.tensor(indices), self.adapter.read(name), tied=not place.alone)
        stored = {piece.parameter for pieces in self.base.pieces.values() for piece in pieces}
        for tied in {key, *(f"{other}.weight" for other in place.followers)} & (stored | {key}):
            self._add(tied, update)  # files may hold a tied weight more than once

    def _add(self, key: str, update: Update) -> None:
        """An embedding's whole weight comes before the low-rank update on top of it."""
        earlier = self.updates.get(key)
        self.updates[key] = update if earlier is None else Then((earlier, update))
