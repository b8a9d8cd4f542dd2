"""An adapter folder in peft's format: `adapter_config.json` and `adapter_model.safetensors`, read with checks.

Written against peft 0.21.2; folders of older versions lack keys, and a missing key has the field's default. A key that
is not known here would change the result, so it is refused unless it holds its neutral value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.methods.lora import LORA_BIAS
from lowrank.adapters.methods.method import Method
from lowrank.adapters.registry import METHODS, method_of, methods_of_type, shared_names
from lowrank.adapters.targeting.matching import matches_end
from lowrank.errors import InputError
from lowrank.storage.hub import local_folder
from lowrank.storage.lock import holder
from lowrank.storage.tensorfile import MAX_HEADER, Entry, TensorFile, open_tensors, parse_json_object
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.fingerprint import Fingerprint
from lowrank.weights.files.layouts import PICKLE, PREFIX, is_mlx, open_mlx, open_pickle, told_layout

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"
TOKENS = ".token_adapter.trainable_tokens_delta"
BASE_KEY, QUANTIZATION_KEY, CONFIG_KEY = "lowrank.base", "lowrank.quantization", "adapter_config"
QUANTISED_FROM = "dtype"
"""Beside a quantisation's own fields: what the base's weights were loaded in, and quantised from."""
HEAD_KEY, METHOD_KEY = "lowrank.head", "lowrank.method"
SHARED_PREFIX = "base_model."
"""Before what all modules of an adapter have in common; here such a tensor has its bare name."""

# Keys that say where a file comes from, and change nothing about what its tensors mean.
_NOTES = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter on disk: its config, its tensors' headers, and what the files say about the base.

    Attributes:
        tensors: File name of each tensor without `base_model.model.` -> its entry.
        base: `base_model_name_or_path`, or None.
        revision: The commit (or another revision) of the base's repository that it was trained on, or None.
        fingerprint: Of the base that it was trained on; None for files that other tools wrote.
        quantization: The base's `quantization_config` while training, {} for none, None where the file does not say.
        model_class: The base's class in training, where the config says so in place of a task.
        before_turn: Whether a peft before 0.19 wrote it, which had fused experts the other way round.
        head: What the base's config said of a head of its own (labels and their like), as far as the file says so.
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, Entry]
    file: TensorFile
    base: str | None
    revision: str | None
    fingerprint: Fingerprint | None
    quantization: dict[str, Any] | None
    model_class: str | None = None
    head: dict[str, Any] = field(default_factory=dict)
    before_turn: bool = False

    def revision_of(self, base: str | Path | None) -> str | None:
        """The revision to load of a base that somebody names: the adapter's own where it is the adapter's own base."""
        return self.revision if base is None or str(base) == self.base else None

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name (without the prefix), on the CPU; InputError when it holds NaN or infinity."""
        return self._finite(name, self.file.read(self.tensors[name].name))

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included) of that tensor."""
        return self._finite(name, self.file.read_rows(self.tensors[name].name, first, last))

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise InputError(f"the adapter's tensor {name} holds NaN or infinity", where=str(self.file.path))
        return tensor


def open_adapter(path: str | Path) -> AdapterFile:
    """Reads the config and the header of an adapter folder, of a hub's repository, or of one exported file.

    Raises:
        InputError: A file is missing, damaged or a pickle; a method or a config key is not supported.
    """
    file, raw, config_path = _open_file(Path(path)) if Path(path).is_file() else _open_folder(path)
    weights_path = file.path
    shared = {f"{SHARED_PREFIX}{name}": name for name in shared_names()}
    strangers = [name for name in file.entries if not name.startswith(PREFIX) and name not in shared]
    if strangers:
        layout = told_layout(strangers)
        raise InputError(
            f"{len(strangers)} tensors do not begin with {PREFIX!r}, as peft's names do: {shorten(strangers)}"
            + (f"; the layout is {layout}" if layout else ""),
            where=str(weights_path),
        )
    if not file.entries:
        raise InputError("the adapter holds no tensor", where=str(weights_path))
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InputError("base_model_name_or_path is not a string", where=str(config_path))
    revision = raw.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise InputError("revision is not a string", where=str(config_path))
    tensors = _plain_names({shared.get(name, name.removeprefix(PREFIX)): entry for name, entry in file.entries.items()})
    return AdapterFile(
        path=Path(path) if Path(path).is_file() else weights_path.parent,
        config=_with_wholes(_parse_config(raw, config_path, file.metadata.get(METHOD_KEY)), list(tensors)),
        tensors=tensors,
        file=file,
        base=base or None,
        revision=revision or None,
        fingerprint=_fingerprint(file),
        quantization=_note(file, QUANTIZATION_KEY),
        model_class=_model_class(raw),
        head=_note(file, HEAD_KEY) or {},
        before_turn=_version(raw) < (0, 19),
    )


def _plain_names(tensors: dict[str, Entry]) -> dict[str, Entry]:
    """Without peft's wrappers: it may write a module saved whole three times, and a trained embedding's base deeper."""
    plain: dict[str, Entry] = {}
    for name, entry in tensors.items():
        path, wrapper, inside = name.partition(".modules_to_save.")
        copies = {f"{path}.{inside}", f"{path}.{inside.partition('.')[2]}"} if wrapper else set()
        if ".original_module." not in name and not copies & tensors.keys():
            plain[name.replace(".modules_to_save.", ".").replace(".token_adapter.base_layer.", ".base_layer.")] = entry
    return plain


def _with_wholes(config: AdapterConfig, tensors: list[str]) -> AdapterConfig:
    """Names in full what the file holds whole and `modules_to_save` means in peft alone: ends that begin at no dot.

    "norm" is every "input_layernorm" there; here, names begin at dots.
    """
    names, more = tuple(config.modules_to_save or []), set()
    for tensor in tensors if names else ():
        path, _, own = tensor.rpartition(".")
        parts = path.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        a_bias = own == "bias" and config.bias != "none"
        added = tensor.endswith((TOKENS, f".{LORA_BIAS}")) or factor_of(tensor) is not None
        if added or "base_layer" in parts or a_bias or tensor in shared_names():
            continue
        if not any(matches_end(one, name) for one in around for name in names):
            more.update([one for one in around if one.endswith(names)][:1])
    return config.model_copy(update={"modules_to_save": [*names, *sorted(more)]}) if more else config


def _open_folder(path: str | Path) -> tuple[TensorFile, dict[str, Any], Path]:
    folder = local_folder(path, "adapter")
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.is_file():
        raise InputError(
            f"this is no adapter folder: it has no {CONFIG_NAME}{_found_instead(folder)}",
            where=str(folder),
            fix=_under_way(folder),
        )
    raw = read_json(config_path)
    if is_mlx(folder, raw):
        return *open_mlx(folder, raw), config_path
    if not weights_path.is_file() and (folder / PICKLE).is_file():
        return open_pickle(folder / PICKLE), raw, config_path
    _refuse_pickle(folder, weights_path)
    return open_tensors(weights_path), raw, config_path


def _found_instead(folder: Path) -> str:
    """What a folder that is none holds: a model, or adapters of another layout."""
    if (folder / "config.json").is_file():
        return "; it holds a whole model"
    for file in sorted(folder.glob("*.safetensors")):
        if layout := told_layout(open_tensors(file).entries):
            return f"; the layout of {file.name} is {layout}"
    return ""


def _under_way(folder: Path) -> str | None:
    """Where a run's adapters are while it has not ended."""
    who = holder(folder)
    there = "" if who is None else f"A run is at work in it ({who}). "
    checkpoints = folder / "checkpoints"
    return f"{there}Its checkpoints are in {checkpoints}." if checkpoints.is_dir() else there.strip() or None


def _open_file(path: Path) -> tuple[TensorFile, dict[str, Any], Path]:
    if path.suffix != ".safetensors":
        raise InputError("an adapter is a folder, or one .safetensors file", where=str(path))
    file = open_tensors(path)
    if CONFIG_KEY not in file.metadata:
        own = all(name.startswith(PREFIX) for name in file.entries)
        layout = None if own else told_layout(file.entries)
        told = f"; the layout is {layout}" if layout else ""
        raise InputError(
            f"the file's metadata holds no {CONFIG_KEY}{told}", where=str(path), fix="Give the adapter's folder."
        )
    return file, parse_json_object(file.metadata[CONFIG_KEY].encode(), path), path


def _parse_config(raw: Mapping[str, Any], where: Path, method: str | None = None) -> AdapterConfig:
    """The config in an `adapter_config.json`.

    Args:
        raw: Its content.
        where: The file.
        method: The method that lowrank trained it with, where `peft_type` does not tell. Where it is not registered,
            the file is read as what its `peft_type` says, which makes the same model.

    Raises:
        InputError: With the list of every key that is unknown and not neutral, or has a wrong value.
    """
    candidates = methods_of_type(raw.get("peft_type"))
    if not candidates:
        readable = dict.fromkeys(known.peft_type for known in METHODS.values())
        raise InputError(
            f"peft_type is {raw.get('peft_type')!r}; {' and '.join(readable)} can be read", where=str(where)
        )
    kind = next((known for known in candidates if known.name == method), candidates[0])
    known = {name: value for name, value in raw.items() if name in kind.config.model_fields}
    rest = {name: value for name, value in raw.items() if name not in known and name not in _NOTES}
    wrong = [f"{name}: {value!r}" for name, value in rest.items() if not _is_neutral(name, value, kind)]
    if wrong:
        raise InputError(f"not supported: {'; '.join(wrong)}", where=str(where))
    return _validated(kind, kind.fields_of(known, str(where)), where)


def refuse_taken_out(adapter: AdapterFile) -> None:
    """InputError when the factors stand for ΔW only together with what PiSSA or OLoRA took out of the base."""
    if init := method_of(adapter.config).taken_out(adapter.config):
        raise InputError(
            f"the adapter was initialised with {init!r}, and belongs to a base that this changed",
            where=str(adapter.path),
            fix="Load it into its base and save it again: that makes an ordinary LoRA of it.",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 100 MB; InputError otherwise."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise InputError("the file is too large for a config", where=str(path))
        return parse_json_object(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error


def shorten(names: list[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _validated(method: Method, fields: dict[str, Any], where: Path) -> AdapterConfig:
    absent_means_none = {"target_modules": None}
    try:
        return method.config.model_validate(absent_means_none | fields)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors()]
        raise InputError(f"the adapter's config is wrong: {'; '.join(problems)}", where=str(where)) from error


def _is_neutral(name: str, value: object, method: Method) -> bool:
    """None, False and empty values are neutral for every key."""
    if name in method.start_only | method.unused or value is None or value is False or value in ({}, [], ""):
        return True
    return name in method.neutral and value == method.neutral[name]


def _refuse_pickle(folder: Path, weights: Path) -> None:
    if weights.is_file():
        return
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)]
    if pickles:
        raise InputError(
            f"the weights are a pickle ({shorten(pickles)}), which can run code when it is read; it is not",
            where=str(folder),
            fix=f"Convert it to {WEIGHTS_NAME} with the tool that wrote it.",
        )
    raise InputError(f"the adapter folder has no {WEIGHTS_NAME}", where=str(folder))


def _version(raw: Mapping[str, Any]) -> tuple[int, int]:
    """peft's, which its oldest files do not name."""
    found = re.match(r"(\d+)\.(\d+)", str(raw.get("peft_version")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _model_class(raw: Mapping[str, Any]) -> str | None:
    mapping = raw.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return named if isinstance(named, str) else None


def _fingerprint(file: TensorFile) -> Fingerprint | None:
    note = _note(file, BASE_KEY)
    return None if note is None else Fingerprint.from_json(note, file.path)


def _note(file: TensorFile, key: str) -> dict[str, Any] | None:
    text = file.metadata.get(key)
    return None if text is None else parse_json_object(text.encode(), file.path)
