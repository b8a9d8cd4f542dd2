"""The base that an adapter belongs to, opened in the sizes and under the class that it had in training.

What a run resized is in the adapter's file and not in the base's folder: more tokens, another number of labels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowrank.adapters.methods.lora import LORA_A, LORA_B
from lowrank.adapters.targeting.matching import matches_end
from lowrank.errors import InputError
from lowrank.weights.files.adapter_file import TOKENS, AdapterFile
from lowrank.weights.files.fingerprint import Fingerprint
from lowrank.weights.files.model_folder import ModelFolder, Sizes, open_base
from lowrank.weights.files.relocation import named_as_in
from lowrank.weights.files.vocabulary import vocabulary_ends

_CLASSIFIERS = ("SequenceClassification", "TokenClassification", "ImageClassification", "AudioClassification")


def open_for(
    adapter: AdapterFile, base: str | Path | None, trust_remote_code: bool = False
) -> tuple[AdapterFile, ModelFolder]:
    """An adapter's base, and the adapter under the base's names.

    Args:
        adapter: The adapter.
        base: A model folder or a hub's name; None takes the one that the adapter's config names.
        trust_remote_code: Whether the base may run its own code.

    Raises:
        InputError: There is no such base, or it is not the one that the adapter was trained on.
    """
    name = base if base is not None else adapter.base
    if name is None:
        raise InputError("the adapter's config names no base model", where=str(adapter.path), fix="Give it (--base).")

    def opened(sizes: Sizes) -> ModelFolder:
        task = adapter.config.task_type
        revision = adapter.revision_of(base)
        return open_base(name, task, trust_remote_code, revision, model_class=adapter.model_class, sizes=sizes)

    model = opened(Sizes())
    adapter = named_as_in(adapter, model.skeleton)
    sizes = Sizes(_vocabulary(adapter, model), _labels(adapter, model))
    if sizes != Sizes():
        model = opened(sizes)
    _check_fingerprint(adapter, model)
    return adapter, model


def _check_fingerprint(adapter: AdapterFile, base: ModelFolder) -> None:
    if adapter.fingerprint is None:
        return
    trained_on, own = adapter.fingerprint, Fingerprint.of(base.config)
    if base.sizes.vocabulary is not None and _explains(base.sizes.vocabulary, trained_on):
        trained_on = replace(trained_on, vocab_size=own.vocab_size)
    different = trained_on.differences_from(base.config)
    if different:
        raise InputError(
            f"the adapter was trained on another base: {', '.join(different)}",
            where=str(adapter.path),
            fix=f"Give the base that it was trained on (--base){f': {adapter.base}' if adapter.base else ''}.",
        )


def _explains(rows: int, trained_on: Fingerprint) -> bool:
    """A config may name fewer tokens than the tables have rows for."""
    return trained_on.vocab_size is None or trained_on.vocab_size <= rows


def _vocabulary(adapter: AdapterFile, base: ModelFolder) -> int | None:
    """How many tokens the adapter's tensors are for, where the base's folder has another number."""
    for path, module in vocabulary_ends(base.skeleton).items():
        own = module.get_parameter("weight").shape[0]
        names = {f"{path}.weight": 0, f"{path}.base_layer.weight": 0}
        names |= {f"{path}.{LORA_A.on_table}": 1, f"{path}.{LORA_B.in_file}": 0}
        rows = [adapter.tensors[name].shape[dim] for name, dim in names.items() if len(_shape(adapter, name)) == 2]
        if rows:
            return rows[0] if rows[0] != own else None
        if f"{path}{TOKENS}" in adapter.tensors and (beyond := _last_token(adapter, path) + 1) > own:
            return beyond
    return None


def _shape(adapter: AdapterFile, name: str) -> tuple[int, ...]:
    return adapter.tensors[name].shape if name in adapter.tensors else ()


def _last_token(adapter: AdapterFile, path: str) -> int:
    indices = getattr(adapter.config, "trainable_token_indices", None) or []
    if isinstance(indices, dict):
        indices = next((ids for module, ids in indices.items() if matches_end(path, module)), [])
    return max(indices, default=-1)


def _labels(adapter: AdapterFile, base: ModelFolder) -> int | None:
    """How many labels the adapter's head has, where the base's config says another number."""
    if not type(base.skeleton).__name__.endswith(_CLASSIFIERS):
        return None
    own = base.skeleton.config.num_labels
    for name, parameter in base.skeleton.state_dict().items():
        shape = _shape(adapter, name)
        if parameter.shape[:1] == (own,) and shape[1:] == parameter.shape[1:] and shape[:1] not in ((), (own,)):
            return shape[0]
    return None
