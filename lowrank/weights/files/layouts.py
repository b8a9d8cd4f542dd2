"""Adapters in other layouts than peft's safetensors: mlx-lm's and peft's pickles are read as if they were peft's own.

mlx-lm (its `tuner/lora.py`, `dora.py`): `adapters.safetensors` holds lora_a (in, r) and lora_b (r, out) of each module,
y = Wx + scale · (x · lora_a) · lora_b, and for DoRA the norms m (out,); a full fine-tune holds the weights themselves.
`adapter_config.json` names the method and one scale. Layouts that are not read are told by their names.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import InputError
from lowrank.storage.tensorfile import CODES, Entry, TensorFile, open_tensors

MLX_WEIGHTS = "adapters.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_MLX_FACTOR = re.compile(r"(?P<path>.+)\.(?P<name>lora_a|lora_b|m)")


@dataclass(frozen=True, slots=True)
class GivenTensors(TensorFile):
    """Tensors that are no bytes of a safetensors file, under the names and shapes that they shall have."""

    tensors: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]()

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.tensors[name]()[first:last]

    def read_bytes(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.tensors[name]().contiguous().view(-1).view(torch.uint8)[first:last]


def open_pickle(path: Path) -> TensorFile:
    """peft's `adapter_model.bin`, without running any code that it might hold.

    Raises:
        InputError: It holds more than tensors, or cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            "the pickle cannot be read as tensors alone, and other content could run code",
            where=str(path),
            fix="Convert it to adapter_model.safetensors with the tool that wrote it.",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError("the pickle is no table of tensors", where=str(path))
    return _given(path, {name: (tensor.shape, tensor.dtype, partial(_same, tensor)) for name, tensor in state.items()})


def is_mlx(folder: Path, raw: Mapping[str, Any]) -> bool:
    """Whether a folder holds what mlx-lm writes."""
    return "peft_type" not in raw and (folder / MLX_WEIGHTS).is_file()


def open_mlx(folder: Path, raw: Mapping[str, Any]) -> tuple[TensorFile, dict[str, Any]]:
    """mlx-lm's tensors under peft's names and in its orientation, and what peft's config says of them.

    Raises:
        InputError: Something that peft's files cannot express, by name.
    """
    path = folder / MLX_WEIGHTS
    file, method = open_tensors(path), raw.get("fine_tune_type", "lora")
    base = {"base_model_name_or_path": raw.get("model") if isinstance(raw.get("model"), str) else None}
    if method == "full":
        whole = sorted({name.rpartition(".")[0] for name in file.entries})
        config = {"peft_type": "LORA", "target_modules": [], "modules_to_save": whole}
        return _given(path, {PREFIX + name: _read_as(file, name, "") for name in file.entries}), {**base, **config}
    if method not in ("lora", "dora"):
        raise InputError(f"mlx-lm's fine_tune_type {method!r} is not read; lora, dora and full are", where=str(folder))
    found = {name: match for name in file.entries if (match := _MLX_FACTOR.fullmatch(name))}
    _refuse_mlx(file, found, method)
    ranks = {match["path"]: file.entries[name].shape[1] for name, match in found.items() if match["name"] == "lora_a"}
    scale = _mlx_scale(raw, folder)
    common = max(ranks.values(), key=list(ranks.values()).count)
    others = {module: rank for module, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": scale * common,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {module: scale * rank for module, rank in others.items()},
        "use_dora": method == "dora",
    }
    tensors = {}
    for name, match in found.items():
        tensors[PREFIX + _peft_name(match)] = _read_as(file, name, match["name"])
    return _given(path, tensors), {**base, **config}


def told_layout(names: Iterable[str]) -> str | None:
    """Whose layout tensors of these names have, where it is known and none that is read."""
    names = list(names)
    known = {
        "kohya's (sd-scripts), for image models": r"lora_(unet|te\d?)_.*\.(lora_(down|up)(\.weight)?|alpha)",
        "diffusers', for image models": r"(unet|transformer|text_encoder(_2)?)\..*lora.*",
        "LyCORIS's": r".*\.(hada_w\d_[ab]|lokr_w\d)",
        "a state dict of a live peft model's, with the adapter's name in its names": r".*\.lora_[AB]\.[^.]+\.weight",
        "torchtune's": r".*\.(lora_a|lora_b)\.weight",
        "mlx-lm's, without its adapter_config.json": r".*\.(lora_a|lora_b)",
        "peft's, without the prefix base_model.model.": r".*\.lora_(embedding_)?[AB](\.weight)?",
    }
    for layout, pattern in known.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return layout
    return None if any("lora" in name for name in names) else "a whole model's, and no adapter's"


def _refuse_mlx(file: TensorFile, found: Mapping[str, re.Match[str]], method: str) -> None:
    strange = [name for name in file.entries if name not in found]
    stacks = [name for name, match in found.items() if len(file.entries[name].shape) > 2]
    if strange or stacks:
        which = "tensors beside factors" if strange else "factors of stacked experts (switch layers)"
        raise InputError(f"mlx-lm's adapter holds {which}: {', '.join((strange or stacks)[:8])}", where=str(file.path))
    needed = {"lora_a", "lora_b"} | ({"m"} if method == "dora" else set())
    parts: dict[str, set[str]] = {}
    for match in found.values():
        parts.setdefault(match["path"], set()).add(match["name"])
    wrong = [path for path, names in parts.items() if names != needed]
    tables = [path for path in parts if method == "dora" and path.endswith(("embed_tokens", "wte"))]
    if not parts or wrong:
        raise InputError(f"mlx-lm's factors are not complete: {', '.join(wrong[:8]) or 'none'}", where=str(file.path))
    if tables:
        raise InputError(
            f"mlx-lm's DoRA keeps a norm of each token of {', '.join(tables)}, peft's one of each feature",
            where=str(file.path),
        )


def _mlx_scale(raw: Mapping[str, Any], folder: Path) -> float:
    fields = raw.get("lora_parameters")
    scale = fields.get("scale") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or not isinstance(scale, int | float) or scale <= 0:
        raise InputError("mlx-lm's config has no lora_parameters with a scale above 0", where=str(folder))
    if isinstance(alpha := fields.get("alpha"), int | float):  # before 0.19 or so, both
        return float(scale) * alpha / fields["rank"]
    return float(scale)


def _peft_name(match: re.Match[str]) -> str:
    table = match["path"].endswith(("embed_tokens", "wte"))
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    tables = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
    return f"{match['path']}.{(tables if table else names)[match['name']]}"


def _read_as(file: TensorFile, name: str, part: str) -> tuple[tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]:
    entry = file.entries[name]
    if part in ("lora_a", "lora_b"):
        return entry.shape[::-1], entry.torch_dtype, lambda: file.read(name).t().contiguous()
    return entry.shape, entry.torch_dtype, lambda: file.read(name)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _given(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]]
) -> GivenTensors:
    entries = {
        name: Entry(name, CODES[dtype], tuple(shape), 0, torch.Size(shape).numel() * dtype.itemsize)
        for name, (shape, dtype, _) in tensors.items()
    }
    return GivenTensors(path, entries, {}, {name: read for name, (_, _, read) in tensors.items()})
