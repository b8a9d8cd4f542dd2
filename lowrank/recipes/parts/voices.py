"""One base in memory that answers as itself and as each of its adapters."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lowrank.adapters import disabled, using
from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.recipes.parts.opened import adapter_folder, base_name, base_of, tokenizer_of
from lowrank.weights import load
from lowrank.weights.files.adapter_file import AdapterFile, open_adapter
from lowrank.weights.files.notes import noted_ends, stop_at

BASE = "base"


@dataclass(frozen=True)
class Voice:
    """Who answers: an adapter, or the base (`adapter` None); with its own tokenizer, template and end tokens."""

    name: str
    path: str
    model: Any
    tokenizer: Any
    generation: GenerationConfig
    adapter: str | None

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within the block the model answers as this one does where it is loaded alone."""
        before = self.model.generation_config
        self.model.generation_config = self.generation
        try:
            with disabled(self.model) if self.adapter is None else using(self.model, self.adapter):
                yield
        finally:
            self.model.generation_config = before


def open_voices(paths: Sequence[str], base: str | None, trust_remote_code: bool) -> list[Voice]:
    """The base and its adapter, of one path; the adapters, of several.

    Raises:
        InputError: a path holds no adapter or is given twice, bases differ, or an adapter cannot be used beside others.
    """
    files = _files(paths)
    for file in files[1:]:
        _check_same_base(files[0], file, base)
    model = base_of(files[0], base, trust_remote_code)
    plain = model.generation_config
    voices = []
    for i, (name, path, file) in enumerate(zip(_names(paths), paths, files, strict=True)):
        model.generation_config = copy.deepcopy(plain)
        tokenizer = tokenizer_of(file, base, trust_remote_code)
        load(model, file.path, f"voice_{i}")
        stop_at(model, tokenizer, noted_ends(file.path))
        voices.append(Voice(name, path, model, tokenizer, model.generation_config, f"voice_{i}"))
    if len(voices) > 1:
        return voices
    only = voices[0]
    return [Voice(BASE, only.path, model, only.tokenizer, only.generation, None), only]


def _files(paths: Sequence[str]) -> list[AdapterFile]:
    folders = [adapter_folder(path) for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folder is None:
            raise InputError(f"{path} is no adapter's folder", fix="Give the folders of runs or adapters.")
    found = [folder.resolve() for folder in folders if folder is not None]
    for path, folder in zip(paths, found, strict=True):
        if found.count(folder) > 1:
            raise InputError(f"{path} is given twice")
    return [open_adapter(folder) for folder in folders if folder is not None]


def _check_same_base(first: AdapterFile, other: AdapterFile, base: str | None) -> None:
    for what, a, b in (
        ("base", base_name(first, base), base_name(other, base)),
        ("commit of the base", first.revision_of(base), other.revision_of(base)),
        ("quantization", first.quantization or None, other.quantization or None),
    ):
        if a != b:
            raise InputError(
                f"was trained on another {what} ({b}) than {first.path} ({a})",
                where=str(other.path),
                fix="Ask each alone.",
            )


def _names(paths: Sequence[str]) -> list[str]:
    """The folders' names; where two are alike, or one is named as the base is, the whole path."""
    short = [Path(expanded(path)).resolve().name for path in paths]
    count = Counter([BASE, *short])
    whole = [str(Path(expanded(path)).resolve()) for path in paths]
    return [name if count[name] == 1 else path for name, path in zip(short, whole, strict=True)]
