"""An adapter into a checkpoint on disk, tensor by tensor, without ever holding the model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lowrank.errors import InputError, JobError
from lowrank.storage.folders import new_folder, refuse_inside, refuse_occupied, require_space, sync
from lowrank.weights.files.adapter_file import AdapterFile, open_adapter, refuse_taken_out, shorten
from lowrank.weights.files.dequantise import Onto, choose_decoding
from lowrank.weights.files.model_folder import INDEX, ModelFolder, open_base
from lowrank.weights.files.sidecars import copy_sidecars, write_config
from lowrank.weights.merging.match import find_updates
from lowrank.weights.merging.matching_base import open_for
from lowrank.weights.merging.merge_choices import MergedDtype, Rounding
from lowrank.weights.merging.merge_plan import Plan, make_plan
from lowrank.weights.merging.merge_report import MergeReport, make_report, total_loss
from lowrank.weights.merging.merged_config import changed_config, text_key
from lowrank.weights.merging.proof import Trial
from lowrank.weights.merging.rounding import RoundingLoss, check_rounding
from lowrank.weights.merging.shard_writer import Progress, write_shard
from lowrank.weights.merging.verify import Verification, check_verify, refuse_unanswering, verify_merge

Verify = bool | Literal["answers"]


def merge_checkpoint(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    rounding: Rounding = "nearest",
    onto: Onto = "dequantised",
    quantization: Mapping[str, Any] | None = None,
    verify: Verify = True,
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
        quantization: How the base was quantised in training (a quantiser's options), for adapters whose files do
            not say; lowrank's do.
        verify: True tries each changed tensor while it is made, on a random vector, against base and adapter: for any
            size, for little more time. "answers" loads base and adapter, then the merged model, and compares what they
            answer, too. False does neither.
        trust_remote_code: Whether the base may run its own code.
        progress: Called with the bytes done and the bytes in all.

    Raises:
        InputError: Adapter, base or out cannot be used; nothing is written.
        JobError: The disk is full, or the result failed its check; nothing is left behind.
    """
    started = time.monotonic()
    target, out = _dtype(dtype), Path(out)
    check_rounding(rounding)
    check_verify(verify)
    refuse_occupied(out)
    source, model = _opened(adapter, base, out, trust_remote_code)
    if verify == "answers":
        refuse_unanswering(model)
    trained_over = quantization if quantization is not None else source.quantization
    updates = find_updates(source, model)
    plan = make_plan(model, updates, target, choose_decoding(model, onto, trained_over))
    require_space(out, plan.size + 64 * 2**20)
    with new_folder(out) as work:
        trial = Trial(model, source, updates, rounding) if verify else None
        losses = _write(plan, model, work, rounding, progress, trial)
        proof = None if trial is None else trial.finish()
        copy_sidecars(model.folder, source.path, work)
        write_config(model.folder, work, plan.config | changed_config(model, source.head), text_key(model))
        _check(work, model, source, plan, trust_remote_code)
        seconds = time.monotonic() - started
        verified = _verify(model, source, work, onto, trained_over, total_loss(losses)) if verify == "answers" else None
    return make_report(out, model, plan, losses, seconds, proof, verified)


def _opened(
    adapter: str | Path, base: str | Path | None, out: Path, trust_remote_code: bool
) -> tuple[AdapterFile, ModelFolder]:
    """Adapter and base, neither of which `out` lies in."""
    source = open_adapter(adapter)
    refuse_taken_out(source)
    source, model = open_for(source, base, trust_remote_code)
    for folder in (model.folder, source.path):
        refuse_inside(out, folder)
    return source, model


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in get_args(MergedDtype):
        raise InputError(f"the dtype {dtype!r} is not one of {', '.join(get_args(MergedDtype))}")
    return None if dtype is None else getattr(torch, name)


def _write(
    plan: Plan,
    base: ModelFolder,
    work: Path,
    rounding: Rounding,
    progress: Progress | None,
    trial: Trial | None,
) -> dict[str, RoundingLoss]:
    losses: dict[str, RoundingLoss] = {}
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
            losses |= write_shard(work / name, tensors, metadata, rounding, advance, trial)
            flushed.append(flusher.submit(sync, work / name))
        for future in flushed:
            future.result()
    if base.sharded:
        weight_map = {tensor.name: name for name, tensors in plan.shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return losses


def _check(work: Path, base: ModelFolder, adapter: AdapterFile, plan: Plan, trust_remote_code: bool) -> None:
    """Reads the result back as a model folder: every parameter that the base had a tensor for has one."""
    merged = open_base(work, adapter.config.task_type, trust_remote_code, model_class=adapter.model_class)
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
        raise JobError(f"the merged files failed their check: {shorten(wrong)} are not as they should be")


def _verify(
    base: ModelFolder,
    adapter: AdapterFile,
    work: Path,
    onto: Onto,
    trained_over: Mapping[str, Any] | None,
    loss: RoundingLoss,
) -> Verification:
    stored = base.quantization is not None
    found = verify_merge(base, adapter, work, None if stored or onto == "original" else dict(trained_over or {}))
    if found.failed and loss.share < 0.5:
        raise JobError(
            f"the merged model's logits differ from base and adapter by {found.logit_error:.0%} of the adapter's "
            "effect, and rounding does not explain that"
        )
    return found
