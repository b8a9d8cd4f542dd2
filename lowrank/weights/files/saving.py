"""Adapters of a live model to files and back, in peft's format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.adapters import adapter_tensors, delete, wrap
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.conversion import as_lora as lora_form
from lowrank.adapters.conversion import portable
from lowrank.adapters.experts.single import single_places
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.modules import bare, base_modules
from lowrank.adapters.record import find_record
from lowrank.adapters.registry import method_of
from lowrank.adapters.wrapping import for_this_model
from lowrank.errors import InputError
from lowrank.quantisers.registry import quantiser_of
from lowrank.weights.files.adapter_file import QUANTISED_FROM, AdapterFile, open_adapter, shorten
from lowrank.weights.files.expert_layout import turned_experts
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.fingerprint import Fingerprint, commit_of, text_config
from lowrank.weights.files.notes import stop_as_noted
from lowrank.weights.files.relocation import named_as_in
from lowrank.weights.files.target_names import target_names, whole_names
from lowrank.weights.files.vocabulary import base_tensors, new_rows, rows_to_save, tied_tokens, vocabulary_ends
from lowrank.weights.files.writing import write_adapter

Model = TypeVar("Model", bound=nn.Module)


def save(
    model: nn.Module,
    path: str | Path,
    adapter: str = "default",
    *,
    overwrite: bool = False,
    as_lora: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> Path:
    """Writes one adapter of a model as `adapter_config.json` and `adapter_model.safetensors`.

    peft, transformers' `load_adapter` and vLLM read the folder. The base's fingerprint goes into the tensors' metadata,
    which they pass over. Files that the folder holds besides stay; the two appear when they are complete.

    Args:
        model: A wrapped model.
        path: The folder.
        adapter: The adapter's name; it does not occur in the files.
        overwrite: Whether to replace an adapter that the folder holds already.
        as_lora: Write an adapter of another method (AdaLoRA, MiSS) as an ordinary LoRA, which more programs read.
        save_embedding_layers: Whether the base's own embedding and head go into the file too; "auto": where training
            changed their number of tokens, for then no checkpoint of the base has these rows.

    Returns:
        The folder.

    Raises:
        InputError: No adapter of that name, a value that is not finite, an adapter is there already, the model has
            no embedding to save, or a module has been replaced or resized since the adapter was put on it.
        JobError: The disk is full.
    """
    model = bare(model)
    if save_embedding_layers is True and not vocabulary_ends(model):
        raise InputError(f"save_embedding_layers: a {type(model).__name__} does not say which its embeddings are")
    config, live = (lora_form if as_lora else portable)(model, adapter)
    if save_embedding_layers is not False:
        live = live | rows_to_save(model, adapter, always=save_embedding_layers is True)
    update = {"target_modules": _targets(model, config, live), "task_type": config.task_type or _task_type(model)}
    update["modules_to_save"] = whole_names(base_modules(model), config.modules_to_save)
    known = isinstance(model, PreTrainedModel)
    write_adapter(
        Path(path),
        config.model_copy(update=update),
        live,
        base=_name_of(model),
        revision=commit_of(model.config) if known else None,
        fingerprint=Fingerprint.of(model.config) if known else None,
        quantization=_quantization(model) if known else None,
        auto_mapping=_class_of(model) if known and update["task_type"] is None else None,
        head=_head(model) if known else {},
        overwrite=overwrite,
    )
    return Path(path)


def load(
    model: Model, path: str | Path, adapter: str = "default", strict: bool = True, trainable: bool = False
) -> Model:
    """Puts an adapter from a folder into a model (bare or wrapped) and makes it the active one.

    It fits the text half of a whole model (vision and language) and the whole one alike, and models whose names
    another release of transformers had otherwise. Rows of new tokens that the file brings go into the base, and answers
    end where the generation config beside the adapter says, too.

    Args:
        model: The base that the adapter was trained on.
        path: A folder in peft's format, of any version.
        adapter: The name that it gets.
        strict: Refuse whatever does not fit; False warns with the list of what was skipped, and leaves it out.
        trainable: Whether its parameters require gradients.

    Returns:
        The same model.

    Raises:
        InputError: Missing, unexpected or misshapen tensors, NaN, another base, a config key that is not known, a
            pickle. The model is then as it was.
    """
    inner: nn.Module = bare(model)
    file = named_as_in(open_adapter(path), inner)
    rows, problems = new_rows(inner, file)
    problems = _other_base(inner, file) + problems
    if problems and strict:
        _refuse(file, problems)
    old_rows = [row.put_in() for row in rows]
    try:
        problems += _put_in(inner, file, adapter, strict, trainable)
    except BaseException:
        for row in old_rows:
            row.put_in()
        raise
    if problems:
        warnings.warn(f"{file.path}: skipped because it does not fit: {'; '.join(problems)}")
    stop_as_noted(inner, file.path)
    return model


def _put_in(model: nn.Module, file: AdapterFile, adapter: str, strict: bool, trainable: bool) -> list[str]:
    """Wraps and fills; returns what does not fit. The model carries what it carried before if that fails."""
    record = find_record(model)
    active = () if record is None else record.activity.names
    wrap(model, _config_here(model, file), adapter, trainable=trainable)
    try:
        turned = turned_experts(model, adapter, file)
        return _fill(model, adapter_tensors(model, adapter), file, strict, turned)
    except BaseException:
        delete(model, adapter)
        if record is not None:
            record.activity.names = active
        raise


def _config_here(model: nn.Module, file: AdapterFile) -> AdapterConfig:
    """The file's config for this model; single experts, which the model holds in one, are named in full."""
    paths = dict.fromkeys(found.path for name in file.tensors if (found := factor_of(name)))
    modules = base_modules(model)
    singles = [path for path in paths if path not in modules and ".base_layer" not in path]
    if not singles or not set(singles) <= single_places(model).keys():
        return for_this_model(model, file.config)
    others = [path for path in paths if path in modules]
    config = file.config.model_copy(update={"target_modules": others})
    config = for_this_model(model, config) if others else config
    return config.model_copy(update={"target_modules": [*others, *singles]})


@torch.no_grad()
def _fill(
    model: nn.Module, live: dict[str, torch.Tensor], file: AdapterFile, strict: bool, turned: dict[str, torch.Tensor]
) -> list[str]:
    """Copies the file's tensors (`turned` in place of some) into the live ones; returns what does not fit."""
    sizes = {name: tuple(turned[name].shape) if name in turned else file.tensors[name].shape for name in file.tensors}
    missing = [name for name in live if name not in file.tensors]
    handled = base_tensors(model, file).keys() | tied_tokens(model, file)
    unexpected = [name for name in file.tensors if name not in live and name not in handled]
    both = [name for name in live if name in file.tensors]
    misshapen = [name for name in both if sizes[name] != tuple(live[name].shape)]
    shapes = [f"{name} {list(sizes[name])} (here {list(live[name].shape)})" for name in misshapen]
    lists = {"missing": missing, "unexpected": unexpected, "misshapen": shapes}
    problems = [f"{what}: {shorten(names, 20)}" for what, names in lists.items() if names]
    if problems and strict:
        _refuse(file, problems)
    for name in both:
        if name not in misshapen:
            live[name].copy_(turned[name] if name in turned else file.read(name))
    if getattr(file.config, "ensure_weight_tying", False):
        problems += [
            f"{name} is tied to another tensor, and not its values"
            for name in both
            if name not in misshapen and not torch.equal(live[name].cpu(), file.read(name).to(live[name].dtype))
        ]
        if problems and strict:
            _refuse(file, problems)
    return problems


def _refuse(file: AdapterFile, problems: list[str]) -> None:
    raise InputError(
        f"the adapter does not fit this model: {'; '.join(problems)}",
        where=str(file.path),
        fix="Load the base that it was trained on; strict=False leaves out what does not fit.",
    )


def _other_base(model: nn.Module, file: AdapterFile) -> list[str]:
    if file.fingerprint is None or not isinstance(model, PreTrainedModel):
        return []
    different = file.fingerprint.differences_from(model.config)
    resized = len(different) == 1 and different[0].startswith("vocab_size")
    hint = f"; if training resized it, call model.resize_token_embeddings({file.fingerprint.vocab_size}) first"
    return [f"another base: {text}{hint if resized else ''}" for text in different]


def _quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """None for a base whose layers are quantised and whose config does not say how."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None if any(quantiser_of(module) is not None for module in model.modules()) else {}
    fields = config if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))
    return fields | {QUANTISED_FROM: str(model.dtype).removeprefix("torch.")}


def _class_of(model: PreTrainedModel) -> dict[str, str]:
    """peft's words for a model that has none of its tasks."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _head(model: PreTrainedModel) -> dict[str, Any]:
    """What the config says of a head that the base's checkpoint may not have."""
    if not type(model).__name__.endswith("Classification"):
        return {}
    config = model.config
    found = {name: getattr(config, name, None) for name in ("id2label", "label2id", "problem_type")}
    found["pad_token_id"] = getattr(text_config(config), "pad_token_id", None)
    return {name: value for name, value in found.items() if value is not None}


def _name_of(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _task_type(model: nn.Module) -> str | None:
    """Only of models that read tokens: peft gives whatever has a task `input_ids`."""
    name = type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder_decoder and name.endswith("ForConditionalGeneration") else None


def _targets(model: nn.Module, config: AdapterConfig, live: dict[str, torch.Tensor]) -> list[str] | str | None:
    """ "all-linear" as the names that it matched: other programs read it differently or not at all.

    And none at all, beside `target_parameters`, as an empty list: peft fills in a missing one by the architecture.
    """
    unsaid = config.exclude_modules and "exclude_modules" in method_of(config).lacks
    if config.target_modules != "all-linear" and not unsaid:
        return config.target_modules or []
    own = {path for path, module in model.named_modules() if kind_of(module) is not None}
    carried = {found.path for name in live if (found := factor_of(name))}
    return target_names(model, sorted(carried & own))
