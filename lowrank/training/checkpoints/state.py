"""Nested state (tables, lists, numbers, texts, tensors) as two files that hold no code: `state.json` beside
`state.safetensors`. What is read equals what was written, to the bit; tuples come back as lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import InputError
from lowrank.storage.tensorfile import TensorFile, open_tensors, save_tensors

TABLE, TENSORS = "state.json", "state.safetensors"
_MARK = "tensor:"  # in the table stands "tensor:NAME" for a tensor; other texts get a "text:" in front
_TEXT = "text:"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the two files into a folder that is there."""
    tensors: dict[str, torch.Tensor] = {}
    table = _without_tensors(state, (), tensors)
    save_tensors(folder / TENSORS, tensors, {"format": "pt"})
    (folder / TABLE).write_text(json.dumps(table), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, its tensors on the CPU.

    Raises:
        InputError: a file is missing or damaged.
    """
    tensors = open_tensors(folder / TENSORS)
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        return _with_tensors(table, tensors)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the checkpoint cannot be read ({error})",
            where=str(folder / TABLE),
            fix="Move it away, and the one before it is taken.",
        ) from error


def _without_tensors(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = "/".join(path)
        tensors[name] = value
        return f"{_MARK}{name}"
    if isinstance(value, dict):
        return {str(key): _without_tensors(part, (*path, str(key)), tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, (*path, str(at)), tensors) for at, part in enumerate(value)]
    return f"{_TEXT}{value}" if isinstance(value, str) else value


def _with_tensors(value: Any, tensors: TensorFile) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_tensors(part, tensors) for part in value]
    if isinstance(value, str) and value.startswith(_MARK):
        return tensors.read(value.removeprefix(_MARK))
    return value.removeprefix(_TEXT) if isinstance(value, str) else value
