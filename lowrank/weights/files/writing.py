"""An adapter's config and tensors as a folder in peft's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.registry import method_of, methods_of_type, shared_names
from lowrank.errors import InputError
from lowrank.storage.folders import into_folder
from lowrank.storage.tensorfile import save_tensors
from lowrank.weights.files.adapter_file import (
    BASE_KEY,
    CONFIG_NAME,
    HEAD_KEY,
    METHOD_KEY,
    PEFT_VERSION,
    PREFIX,
    QUANTIZATION_KEY,
    SHARED_PREFIX,
    WEIGHTS_NAME,
    shorten,
)
from lowrank.weights.files.fingerprint import Fingerprint
from lowrank.weights.files.notes import copy_notes


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    base: str | None,
    revision: str | None,
    fingerprint: Fingerprint | None,
    quantization: dict[str, Any] | None,
    auto_mapping: dict[str, str] | None = None,
    head: dict[str, Any] | None = None,
    overwrite: bool = False,
    notes: Path | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; other files in the folder stay.

    Args:
        folder: Made if it is not there.
        config: Its `target_modules` and `task_type` as they shall stand in the file.
        tensors: By name, without peft's prefix.
        base: What the config names as the base model.
        revision: The commit of its repository, None for a folder.
        fingerprint: Of the base; goes into the tensors' metadata, which other readers pass over.
        quantization: The base's while training, {} for none, None if that is not known; beside the fingerprint.
        auto_mapping: The base's class, where the config names no task.
        head: What the base's config says of its head; beside the fingerprint.
        overwrite: Whether to replace an adapter that the folder holds already.
        notes: A folder whose tokenizer and generation config are copied beside it, as far as it has them.

    Raises:
        InputError: A value is not finite, or an adapter is there already.
        JobError: The disk is full.
    """
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"the adapter holds NaN or infinity: {shorten(broken)}")
    metadata = {"format": "pt"}
    if fingerprint is not None:
        metadata[BASE_KEY] = json.dumps(fingerprint.to_json())
    if quantization is not None:
        metadata[QUANTIZATION_KEY] = json.dumps(quantization)
    if head:
        metadata[HEAD_KEY] = json.dumps(head)
    if (method := method_of(config)).config is not methods_of_type(method.peft_type)[0].config:
        metadata[METHOD_KEY] = method.name  # peft's config does not tell them apart
    fields = config_to_json(config, base, revision) | {"auto_mapping": auto_mapping}
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    with into_folder(folder, last=CONFIG_NAME, overwrite=overwrite) as work:
        file = work / WEIGHTS_NAME
        save_tensors(file, {_in_file(name): tensor for name, tensor in tensors.items()}, metadata)
        file.chmod(0o644)
        if notes is not None:
            copy_notes(notes, work)
        (work / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def config_to_json(config: AdapterConfig, base: str | None, revision: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`, with peft's keys."""
    method = method_of(config)
    return {
        "peft_type": method.peft_type,
        "peft_version": PEFT_VERSION,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        **method.to_json(config),
    }


def _in_file(name: str) -> str:
    return (SHARED_PREFIX if name in shared_names() else PREFIX) + name
