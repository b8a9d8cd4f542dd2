"""An adapter for other programs: vLLM, llama.cpp's converter, mlx-lm, peft, or one safetensors file.

The rules are those of vLLM's `lora/peft_helper.py`, `lora/utils.py` and `lora/lora_model.py`, and of llama.cpp's
`convert_lora_to_gguf.py`. Both take one scale for the whole adapter and plain factors of linear layers and embeddings;
what they cannot express is refused by name, and can be merged into the base instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.methods.lora import LoraConfig
from lowrank.adapters.registry import method_of
from lowrank.errors import InputError
from lowrank.storage.folders import new_file, new_folder, refuse_inside
from lowrank.storage.hub import local_folder
from lowrank.storage.tensorfile import save_tensors
from lowrank.weights.arithmetic.module_factors import SAVE_AS_LORA, Factors, read_factors
from lowrank.weights.export_targets import Target
from lowrank.weights.files.adapter_file import (
    CONFIG_KEY,
    CONFIG_NAME,
    PREFIX,
    AdapterFile,
    open_adapter,
    refuse_taken_out,
    shorten,
)
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.fingerprint import text_config
from lowrank.weights.files.layouts import MLX_WEIGHTS
from lowrank.weights.files.model_folder import load_config, open_base
from lowrank.weights.files.notes import copy_notes
from lowrank.weights.files.relocation import named_as_in
from lowrank.weights.files.sidecars import copy_model_notes
from lowrank.weights.files.target_names import targets_of
from lowrank.weights.files.writing import config_to_json, write_adapter

_NORM = re.compile(r".*(_layernorm|\.norm).*")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        out: The folder or file.
        rank: Of every module in it; None where it was left as it is.
        notes: What was changed, as sentences.
        command: How the other program is called with it.
    """

    out: Path
    rank: int | None
    command: str
    notes: list[str] = field(default_factory=list)


def export(adapter: str | Path, out: str | Path, *, to: Target, base: str | Path | None = None) -> ExportReport:
    """Writes an adapter in the form that another program reads.

    Args:
        adapter: An adapter folder.
        out: A new folder; for "safetensors" a new file.
        to: "vllm": ranks and scales are made the same for all modules, exactly. "llama.cpp": the same, with the base's
            config beside it, which the converter needs. "mlx": the same, in mlx-lm's names and orientation. "peft":
            peft's folder as it is read, out of any layout that is (mlx-lm's, a pickle, one file). "safetensors":
            everything in one file, the config in its metadata; `lowrank.load` reads it.
        base: For "llama.cpp": the base; the one in the adapter's config by default.

    Raises:
        InputError: The adapter cannot be read, `out` is there already, or the target cannot express something.
    """
    if to not in _WRITERS:
        raise InputError(f"there is no target {to!r}; there are {', '.join(_WRITERS)}")
    source = open_adapter(adapter)
    refuse_inside(Path(out), source.path)
    return _WRITERS[to](_as_served(source, base) if to == "vllm" else source, Path(out), base)


def _as_served(adapter: AdapterFile, base: str | Path | None) -> AdapterFile:
    """Under the whole model's names, where the base's folder is here and holds one: vLLM serves that, not its text."""
    folder = Path(base or adapter.base or "")
    if not (base or adapter.base) or not (folder / "config.json").is_file():
        return adapter
    config = load_config(folder)
    if text_config(config) is config:
        return adapter
    return named_as_in(adapter, open_base(folder, adapter.config.task_type).skeleton)


def _for_vllm(adapter: AdapterFile, out: Path, base: str | Path | None) -> ExportReport:
    _refuse_others(adapter, "vLLM", lambda name: False)
    factors = _linear(adapter, "vLLM")
    rank, notes, tensors = _one_scale(factors)
    limit = next((step for step in _VLLM_RANKS if step >= rank), None)
    if limit is None:
        raise InputError(
            f"vLLM takes ranks up to {_VLLM_RANKS[-1]}, and this adapter has {rank}",
            where=str(adapter.path),
            fix="Bring it to a lower rank first (lowrank resize), or merge it into its base (lowrank merge).",
        )
    with new_folder(out) as work:
        _write(work, adapter, _plain_config(adapter, rank, factors), tensors)
    revision = f" --revision {adapter.revision}" if adapter.revision else ""
    command = (
        f"vllm serve {adapter.base or 'BASE'}{revision} --enable-lora --lora-modules name={out} --max-lora-rank {limit}"
    )
    return ExportReport(out, rank, command, notes)


def _for_llama_cpp(adapter: AdapterFile, out: Path, base: str | Path | None) -> ExportReport:
    norms = [name for name, entry in adapter.tensors.items() if _NORM.fullmatch(name) and len(entry.shape) == 1]
    _refuse_others(adapter, "llama.cpp's converter", lambda name: name in norms)
    factors = _linear(adapter, "llama.cpp's converter", skip=frozenset(norms))
    named = base if base is not None else adapter.base
    if named is None:
        raise InputError(
            "the adapter's config names no base model, and the converter needs its config", fix="Give it (--base)."
        )
    folder = local_folder(named, revision=adapter.revision_of(base))
    config = load_config(folder)
    if config.tie_word_embeddings and "lm_head" in factors:
        raise InputError("llama.cpp has no head of its own where the base's is tied, and the adapter is on lm_head")
    rank, notes, tensors = _one_scale(factors)
    with new_folder(out) as work:
        _write(
            work, adapter, _plain_config(adapter, rank, factors), tensors | {name: adapter.read(name) for name in norms}
        )
        (work / "base").mkdir()
        copy_model_notes(folder, work / "base")
    return ExportReport(out, rank, f"python convert_lora_to_gguf.py --base {out / 'base'} {out}", notes)


def _for_mlx(adapter: AdapterFile, out: Path, base: str | Path | None) -> ExportReport:
    _refuse_others(adapter, "mlx-lm", lambda name: False)
    factors = _linear(adapter, "mlx-lm")
    rank, notes, tensors = _one_scale(factors)
    turned = {
        f"{path}.{name}": tensors[file_name].t().contiguous()
        for path, f in factors.items()
        for name, file_name in zip(("lora_a", "lora_b"), f.in_file(), strict=True)
    }
    keys = {path.partition(f".{number}.")[2] or path for path in factors for number in [_layer(path)]}
    config = {
        "model": adapter.base,
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    with new_folder(out) as work:
        save_tensors(work / MLX_WEIGHTS, turned, {"format": "mlx"})
        copy_notes(adapter.path, work)
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return ExportReport(out, rank, f"mlx_lm.generate --model {adapter.base or 'BASE'} --adapter-path {out}", notes)


def _layer(path: str) -> str:
    """The number of the layer that a module is in: mlx-lm's keys begin after it."""
    return next((part for part in path.split(".") if part.isdigit()), "")


def _as_peft(adapter: AdapterFile, out: Path, base: str | Path | None) -> ExportReport:
    with new_folder(out) as work:
        _write(work, adapter, adapter.config, {name: adapter.read(name) for name in adapter.tensors})
    return ExportReport(out, None, f'peft.PeftModel.from_pretrained(model, "{out}")')


def _as_one_file(adapter: AdapterFile, out: Path, base: str | Path | None) -> ExportReport:
    if out.suffix != ".safetensors":
        raise InputError("the name of the file must end in .safetensors", where=str(out))
    metadata = dict(adapter.file.metadata) | {"format": "pt"}
    metadata[CONFIG_KEY] = json.dumps(config_to_json(adapter.config, adapter.base, adapter.revision))
    tensors = {PREFIX + name: adapter.read(name) for name in adapter.tensors}
    with new_file(out) as work:
        save_tensors(work, tensors, metadata)
    return ExportReport(out, None, f'lowrank.load(model, "{out}")')


def _refuse_others(adapter: AdapterFile, program: str, allowed: Callable[[str], bool]) -> None:
    """InputError naming everything that the program has no place for."""
    refuse_taken_out(adapter)
    config, method, cannot = adapter.config, method_of(adapter.config), []
    if not method.composes:
        cannot += [*method.fixed] or [f"method {method.name}"]
    cannot += [field for field in ("target_parameters", "trainable_token_indices") if getattr(config, field, None)]
    cannot += [f"bias: {config.bias}"] if config.bias != "none" else []
    named = [*(config.modules_to_save or [])]
    wholes = [name for name in adapter.tensors if not factor_of(name) and not allowed(name)]
    if named and wholes:
        cannot.append(f"modules_to_save: {', '.join(named)}")
    elif wholes and not cannot:
        cannot.append(shorten(wholes))
    if cannot:
        raise InputError(
            f"{program} cannot express {'; '.join(cannot)}",
            where=str(adapter.path),
            fix=SAVE_AS_LORA if method.of_base else "Merge the adapter into its base instead (lowrank merge).",
        )


def _linear(adapter: AdapterFile, program: str, skip: frozenset[str] = frozenset()) -> dict[str, Factors]:
    factors = read_factors(adapter, skip)
    convolutions = [path for path, f in factors.items() if len(f.shape_A) > 2]
    if convolutions:
        raise InputError(f"{program} cannot express adapters on convolutions: {shorten(convolutions)}")
    return factors


def _one_scale(factors: dict[str, Factors]) -> tuple[int, list[str], dict[str, torch.Tensor]]:
    """Every module at the largest rank, filled with zeros, and at scale 1: the same ΔW."""
    rank = max(f.A.shape[0] for f in factors.values())
    ranks = {f.A.shape[0] for f in factors.values()}
    notes = []
    if len(ranks) > 1:
        notes.append(f"Ranks {sorted(ranks)} are filled with zeros to {rank}.")
    if {f.scale for f in factors.values()} != {1.0}:
        notes.append("The scales are folded into lora_A; lora_alpha is the rank.")
    tensors: dict[str, torch.Tensor] = {}
    for f in factors.values():
        missing = rank - f.A.shape[0]
        A = torch.nn.functional.pad(f.A * f.scale, (0, 0, 0, missing))
        tensors |= f.with_factors(A, torch.nn.functional.pad(f.B, (0, missing))).in_file()
    return rank, notes, tensors


def _write(folder: Path, adapter: AdapterFile, config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes what an adapter has become, as belonging to the base that it was trained on."""
    write_adapter(
        folder,
        config,
        tensors,
        base=adapter.base,
        revision=adapter.revision,
        fingerprint=adapter.fingerprint,
        quantization=adapter.quantization,
        notes=adapter.path,
    )


def _plain_config(adapter: AdapterFile, rank: int, factors: dict[str, Factors]) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets_of([adapter.config], list(factors)),
        fan_in_fan_out=adapter.config.fan_in_fan_out,
        task_type=adapter.config.task_type,
    )


_WRITERS: dict[Target, Callable[[AdapterFile, Path, str | Path | None], ExportReport]] = {
    "vllm": _for_vllm,
    "llama.cpp": _for_llama_cpp,
    "mlx": _for_mlx,
    "peft": _as_peft,
    "safetensors": _as_one_file,
}
