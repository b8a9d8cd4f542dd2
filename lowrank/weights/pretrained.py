"""A wrapped transformers model under the loops that people have: what `_save_pretrained` writes is its adapters.

transformers' own would write the base with tensors that `from_pretrained` passes over. So Trainer's `save_model`, its
checkpoints, resume, `load_best_model_at_end`, `push_to_hub` and TRL's trainers keep what was trained.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from lowrank.adapters import wrapping
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.install import AdapterSet
from lowrank.adapters.methods.method import Batches, Originals
from lowrank.adapters.record import record_of
from lowrank.errors import InputError
from lowrank.storage.tensorfile import save_tensors
from lowrank.weights.files import saving
from lowrank.weights.upload import files_for_hub, upload

Model = TypeVar("Model", bound=nn.Module)

STATE_NAME = "model.safetensors"
"""The live adapters' own tensors, by their names in `state_dict`: what Trainer looks for when it resumes."""


_MEANT_FOR_THE_BASE = {"max_shard_size", "safe_serialization", "save_original_format", "save_peft_format"}
_BASE_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
_MEANT_FOR_THE_HUB = {"repo_id", "token", "private", "commit_message", "create_pr"}


def wrap(
    model: Model,
    config: AdapterConfig,
    adapter: str = "default",
    *,
    trainable: bool = True,
    batches: Batches | None = None,
    originals: Originals | None = None,
) -> Model:
    """`lowrank.adapters.wrap`, after which transformers' own verbs keep the adapters."""
    wrapping.wrap(model, config, adapter, trainable=trainable, batches=batches, originals=originals)
    return _keeping_adapters(model)


def load(
    model: Model, path: str | Path, adapter: str = "default", strict: bool = True, trainable: bool = False
) -> Model:
    """`lowrank.weights.files.saving.load`, after which transformers' own verbs keep the adapters."""
    return _keeping_adapters(saving.load(model, path, adapter, strict=strict, trainable=trainable))


def _keeping_adapters(model: Model) -> Model:
    if isinstance(model, PreTrainedModel):
        record = record_of(model)
        record.patch(model, "save_pretrained", functools.partial(_save_pretrained, model))
        record.patch(model, "load_state_dict", functools.partial(_load_state_dict, model))
        if getattr(model, "is_quantized", False):
            record.patch(model, "_hf_peft_config_loaded", True)  # what Trainer asks of a base in few bits
    return model


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Writes every adapter of a wrapped model in peft's format, and what Trainer resumes from.

    The adapter named "default", or the only one, stands in the folder itself, others in folders of their names, as
    peft has it. `model.safetensors` beside them holds the live adapters' tensors; where the base came from no folder
    and no hub, so that nobody could find it again, it holds the base as well.

    Args:
        model: A wrapped model.
        save_directory: Made if it is not there; adapters that it holds are replaced.
        is_main_process: Whether this process writes.
        state_dict: As trainers pass it: the adapters' part of it must be what the model holds.
        push_to_hub: Whether to upload the adapters (and the base, if it is written too); `repo_id` (by default the
            folder's name), `token`, `private`, `commit_message` and `create_pr` go with it.
        options: transformers' others; those that speak of how the base is split into files have nothing to say here.

    Raises:
        InputError: `state_dict` holds other values than the model, an adapter's value is not finite, an option that
            would be ignored, or there is no token, no network, or the hub refuses.
    """
    if unknown := sorted(set(options) - _MEANT_FOR_THE_BASE - _MEANT_FOR_THE_HUB):
        raise InputError(f"save_pretrained of a wrapped model does not know {unknown[0]}", fix="Leave it out.")
    if not is_main_process:
        return
    folder, live = Path(save_directory), _adapter_state(model)
    _check_same(live, state_dict)
    names = list(record_of(model).configs)
    root = "default" if "default" in names or len(names) > 1 else names[0]
    with _base_beside(model, folder) as base_is_there:
        places = {name: folder if name == root else folder / name for name in names}
        for name, place in places.items():
            saving.save(model, place, name, overwrite=True)
    if not base_is_there:
        save_tensors(folder / STATE_NAME, live, {"format": "pt"})
    if push_to_hub:
        _upload(folder, list(places.values()), base_is_there, **options)


def _load_state_dict(
    model: PreTrainedModel, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> _IncompatibleKeys:
    """`nn.Module.load_state_dict`, for which the adapters' tensors alone are a whole state too."""
    keys = set(_adapter_state(model))
    if state_dict and set(state_dict) <= keys:
        if missing := sorted(keys - set(state_dict)):
            raise InputError(
                f"the state holds only some of the model's adapters: {missing[0]} is not in it ({len(missing)} in all)",
                fix="Wrap the model with the config that the checkpoint was made with.",
            )
        type(model).load_state_dict(model, state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])
    return type(model).load_state_dict(model, state_dict, strict=strict, assign=assign)


def _adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of `state_dict` that is the adapters'; it shares storage with them."""
    return {name: value for name, value in model.state_dict().items() if AdapterSet.CHILD in name.split(".")}


@contextmanager
def _base_beside(model: PreTrainedModel, folder: Path) -> Iterator[bool]:
    """Writes a base that has no place of its own, and names the folder as its place; gives whether it did."""
    if model.config._name_or_path:
        yield False
        return
    type(model).save_pretrained(model, folder)
    model.config._name_or_path = str(folder.resolve())
    try:
        yield True
    finally:
        model.config._name_or_path = ""


def _check_same(live: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor] | None) -> None:
    given = given or {}
    for name, tensor in live.items():
        if name in given and not torch.equal(given[name].to(tensor), tensor):
            raise InputError(
                f"save_pretrained was given another {name} than the model holds",
                fix="Put the values into the model first; an adapter is written from there.",
            )


def _upload(folder: Path, adapters: Sequence[Path], has_base: bool, repo_id: str | None = None, **options: Any) -> None:
    """What the adapters are used with, and the base where it lies beside them: nothing else that the folder holds."""
    base = sorted(file for pattern in _BASE_FILES for file in folder.glob(pattern)) if has_base else []
    files = [file for adapter in adapters for file in files_for_hub(adapter)]
    asked = {name: value for name, value in options.items() if name in _MEANT_FOR_THE_HUB and value is not None}
    _, notes = upload(folder, repo_id or folder.name, files=list(dict.fromkeys([*files, *base])), **asked)
    for note in notes:
        warnings.warn(note, stacklevel=3)
