"""A model's parameters as its files hold them: in one tensor, in several, or as one matrix for each expert."""

from __future__ import annotations

from collections import defaultdict

import torch

from lowrank.errors import InputError
from lowrank.storage.tensorfile import TensorFile
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.files.names import Placement


class Stored:
    """The parameters of a model folder, read one at a time."""

    def __init__(self, model: ModelFolder) -> None:
        self.model = model
        self._parts: dict[str, list[tuple[TensorFile, str, Placement]]] = defaultdict(list)
        for file in model.files.values():
            for name in file.entries:
                for piece in model.pieces[name]:
                    self._parts[piece.parameter].append((file, name, piece))

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._parts

    @property
    def names(self) -> list[str]:
        """Every parameter that the files hold, in their order."""
        return list(self._parts)

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Its shape in the model, or in the file where that is the same tensor."""
        file, name, piece = self._parts[parameter][0]
        return file.entries[name].shape if piece.whole else tuple(self.model.skeleton.state_dict()[parameter].shape)

    def obstacle(self, parameter: str) -> str | None:
        """What transformers does to the files' tensors beyond placing rows; the parameter can then not be read."""
        return next((piece.obstacle for _, _, piece in self._parts[parameter] if piece.obstacle), None)

    def raw(self, parameter: str) -> dict[str, torch.Tensor]:
        """The files' tensors that it is made from, by their names there."""
        return {name: file.read(name) for file, name, _ in self._parts[parameter]}

    def read(self, parameter: str, expert: int | None = None) -> torch.Tensor:
        """The parameter, or one expert's matrix of it, in the files' dtype.

        Raises:
            InputError: transformers does more to the tensor than placing rows.
        """
        parts = [part for part in self._parts[parameter] if part[2].expert in (None, expert)]
        if obstacle := self.obstacle(parameter):
            raise InputError(f"{parameter} reaches the model through {obstacle}, and is not read from the files")
        experts = {part[2].expert for part in self._parts[parameter] if part[2].expert is not None}
        if experts and expert is None:
            return torch.stack([self.read(parameter, number) for number in sorted(experts)])
        if parts[0][2].whole:
            file, name, _ = parts[0]
            return file.read(name) if expert is None else file.read_rows(name, expert, expert + 1)[0]
        ordered = sorted(parts, key=lambda part: part[2].first)
        return torch.cat([file.read_rows(name, piece.at, piece.at + piece.rows) for file, name, piece in ordered])
