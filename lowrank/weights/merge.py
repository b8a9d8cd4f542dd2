"""An adapter into a checkpoint on disk, tensor by tensor, without ever holding the model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank.errors import InputError, JobError
from lowrank.weights.adapterfile import AdapterFile, open_adapter, refuse_taken_out, shorten
from lowrank.weights.basemodel import INDEX, BaseModel, open_base
from lowrank.weights.fingerprint import Fingerprint
from lowrank.weights.fit import find_updates
from lowrank.weights.folders import new_folder, refuse_inside, refuse_occupied, require_space, sync
from lowrank.weights.plan import Plan, make_plan
from lowrank.weights.quantized import Decoding, decode_as_loaded, decode_stored
from lowrank.weights.rounding import Loss, Rounding
from lowrank.weights.sidecars import copy_sidecars, write_config
from lowrank.weights.stream import Progress, write_shard
from lowrank.weights.verify import Verification, can_verify, fits_in_memory, verify_merge

Onto = Literal["dequantised", "original"]
MERGED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: The merged folder.
        base: The base's folder.
        tensors: How many tensors were written.
        changed: How many of them differ from the base's.
        size: Bytes of all tensors.
        seconds: Time that it took.
        rounding_loss: Norm of what rounding took away, as a share of the norm of the adapter's effect; measured on a
            quarter of the blocks of large tensors.
        worst: The tensor with the largest such share, and the share; None without low-rank updates.
        verified: How near its answers are to base and adapter; None where that was not compared.
        notes: What the user should know (weights untied, a large loss), as sentences.
    """

    out: Path
    base: Path
    tensors: int
    changed: int
    size: int
    seconds: float
    rounding_loss: float
    worst: tuple[str, float] | None
    verified: Verification | None
    notes: list[str] = field(default_factory=list)


def merge_checkpoint(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    rounding: Rounding = "nearest",
    onto: Onto = "dequantised",
    quantization: Mapping[str, Any] | None = None,
    verify: bool | None = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges an adapter folder into a model folder, as a new model folder that needs nothing but transformers.

    Memory stays at a few blocks of rows, whatever the model's size. The folder appears under its name when it is
    complete and its files have been read back; when anything fails, nothing is left behind.

    Args:
        base: A model folder or a hub's name; None takes the one that the adapter's config names.
        adapter: An adapter folder in peft's format.
        out: A folder that does not exist, or is empty.
        dtype: Of all float tensors of the result; None keeps the base's. Sums are in float32, rounded once.
        rounding: "nearest", or "stochastic" to keep on average what is too small for the dtype.
        onto: For an adapter trained over a quantised base. "dequantised": onto the weights that the quantised ones
            stand for, as in training. "original": onto the weights before quantisation, which it was not trained on.
        quantization: How the base was quantised in training (BitsAndBytesConfig's fields), for adapters whose files do
            not say; lowrank's do.
        verify: Whether to compare the merged model's answers with base and adapter (both are loaded, one after the
            other); None does so if they fit into memory.
        trust_remote_code: Whether the base may run its own code.
        progress: Called with the bytes done and the bytes in all.

    Raises:
        InputError: Adapter, base or out cannot be used; nothing is written.
        JobError: The disk is full, or the result failed its check; nothing is left behind.
    """
    started = time.monotonic()
    target, out = _dtype(dtype), Path(out)
    refuse_occupied(out)
    source = open_adapter(adapter)
    refuse_taken_out(source)
    model = open_base(_base_of(source, base), source.config.task_type, trust_remote_code)
    for folder in (model.folder, source.path):
        refuse_inside(out, folder)
    check_fingerprint(source, model)
    updates = find_updates(source, model)
    decoding, notes = _decoding(source, model, onto, quantization)
    plan = make_plan(model, updates, target, decoding)
    plan.notes.extend(notes)
    if hasattr(model.config, "quantization_config"):
        plan.config["quantization_config"] = None
    require_space(out, plan.size + 64 * 2**20)
    with new_folder(out) as work:
        losses = _write(plan, model, work, rounding, progress)
        copy_sidecars(model.folder, source.path, work)
        write_config(model.folder, work, plan.config | _architecture(model), _text_key(model))
        _check(work, model, source, plan)
        seconds = time.monotonic() - started
        wanted = can_verify(model) and fits_in_memory(model) if verify is None else verify
        verified = _verify(model, source, work, onto, quantization, _sum(losses)) if wanted else None
    return _report(out, model, plan, losses, seconds, verified)


def check_fingerprint(adapter: AdapterFile, base: BaseModel) -> None:
    """InputError when the adapter's file says that it was trained on another base."""
    if adapter.fingerprint is None:
        return
    different = adapter.fingerprint.differences(Fingerprint.of(base.config))
    if different:
        raise InputError(
            f"The adapter was trained on another base: {', '.join(different)}.",
            where=str(adapter.path),
            fix=f"Give the base that it was trained on{f', {adapter.base}' if adapter.base else ''}.",
        )


def _base_of(adapter: AdapterFile, base: str | Path | None) -> str | Path:
    if base is not None:
        return base
    if adapter.base is None:
        raise InputError("The adapter's config names no base model.", where=str(adapter.path), fix="Give the base.")
    return adapter.base


def _decoding(
    adapter: AdapterFile, base: BaseModel, onto: str, quantization: Mapping[str, Any] | None
) -> tuple[Decoding | None, list[str]]:
    """How the base's weights are read, and what is to be said about that."""
    if onto not in ("dequantised", "original"):
        raise InputError(
            f"onto={onto!r} is neither dequantised nor original. Quantising the merged weights again is not offered: "
            "their steps are larger than most of the adapter's changes, which would be lost.",
            fix="Merge into 16 bits, and keep the adapter apart where 4 bits must be.",
        )
    stored = decode_stored(base)
    trained_over = quantization if quantization is not None else adapter.quantization
    if stored is not None and onto == "original":
        raise InputError(
            "The base's folder holds quantised weights; the original ones are not in it.",
            where=str(base.folder),
            fix="Give the original model as the base.",
        )
    if stored is not None or not trained_over:
        return stored, []
    if onto == "dequantised":
        return decode_as_loaded(base, trained_over), []
    return None, [
        "The adapter was trained over quantised weights and is merged onto the original ones: what it learned to make "
        "up for is not there, and the answers differ from those that were evaluated."
    ]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in MERGED_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in MERGED_DTYPES)
        raise InputError(f"The dtype {dtype!r} is not one of {names}.")
    return found


def _write(plan: Plan, base: BaseModel, work: Path, rounding: Rounding, progress: Progress | None) -> dict[str, Loss]:
    losses: dict[str, Loss] = {}
    done, total = 0, plan.size

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(1) as flusher:  # a shard goes to the disk while the next one is made
        flushed = []
        for name, tensors in plan.shards.items():
            metadata = base.files[name].metadata or {"format": "pt"}
            losses |= write_shard(work / name, tensors, metadata, rounding, advance)
            flushed.append(flusher.submit(sync, work / name))
        for future in flushed:
            future.result()
    if base.sharded:
        weight_map = {tensor.name: name for name, tensors in plan.shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return losses


def _architecture(base: BaseModel) -> dict[str, Any]:
    name = type(base.skeleton).__name__
    return {} if base.config.architectures == [name] else {"architectures": [name]}


def _text_key(base: BaseModel) -> str | None:
    """The key of config.json that holds the text model's config, where that is a part of it."""
    text = base.config.get_text_config()
    return next((name for name in base.config.sub_configs if getattr(base.config, name, None) is text), None)


def _check(work: Path, base: BaseModel, adapter: AdapterFile, plan: Plan) -> None:
    """Reads the result back as a model folder: every parameter that the base had a tensor for has one."""
    merged = open_base(work, adapter.config.task_type)
    planned = {tensor.name for tensors in plan.shards.values() for tensor in tensors}
    entries = {name: entry for file in merged.files.values() for name, entry in file.entries.items()}
    had = {piece.parameter for pieces in base.pieces.values() for piece in pieces}
    has = {piece.parameter for pieces in merged.pieces.values() for piece in pieces}
    parameters = merged.skeleton.state_dict()
    misshapen = {
        name
        for name, pieces in merged.pieces.items()
        if any(piece.whole and entries[name].shape != parameters[piece.parameter].shape for piece in pieces)
    }
    wrong = sorted((planned ^ entries.keys()) | (had - has) | misshapen)
    if wrong:
        raise JobError(f"The merged files failed their check: {shorten(wrong)} are not as they should be.")


def _verify(
    base: BaseModel, adapter: AdapterFile, work: Path, onto: Onto, quantization: Mapping[str, Any] | None, loss: Loss
) -> Verification:
    trained_over = quantization if quantization is not None else adapter.quantization
    stored = hasattr(base.config, "quantization_config")
    found = verify_merge(base, adapter, work, None if stored or onto == "original" else dict(trained_over or {}))
    if found.failed and loss.share < 0.5:
        raise JobError(
            f"The merged model's logits differ from base and adapter by {found.logit_error:.0%} of the adapter's "
            "effect, and rounding does not explain that."
        )
    return found


def _report(
    out: Path, base: BaseModel, plan: Plan, losses: dict[str, Loss], seconds: float, verified: Verification | None
) -> MergeReport:
    whole = _sum(losses)
    worst = max(losses, key=lambda name: losses[name].share, default=None)
    notes = list(plan.notes)
    if whole.share > 0.1:
        notes.append(
            f"Rounding lost {whole.share:.0%} of the adapter's effect: its changes are small beside the weights' "
            'precision. A float32 merge (dtype="float32") or rounding="stochastic" keeps more.'
        )
    tensors = [tensor for shard in plan.shards.values() for tensor in shard]
    return MergeReport(
        out=out,
        base=base.folder,
        tensors=len(tensors),
        changed=sum(bool(tensor.changes) or tensor.decoder is not None for tensor in tensors),
        size=plan.size,
        seconds=seconds,
        rounding_loss=whole.share,
        worst=None if worst is None else (worst, losses[worst].share),
        verified=verified,
        notes=notes,
    )


def _sum(losses: dict[str, Loss]) -> Loss:
    whole = Loss()
    for loss in losses.values():
        whole.add(loss)
    return whole
