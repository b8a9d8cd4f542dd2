"""The model as a config says: the base with its tokenizer, what of it trains, its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank.adapters import METHODS, AdapterConfig, wrap
from lowrank.attention import AttentionChoice, check_packing, set_attention
from lowrank.config.sections import (
    AdapterSection,
    BiasSection,
    FullSection,
    MethodSection,
    ModelSection,
    QuantizationSection,
)
from lowrank.data import complete_template, use_template
from lowrank.data.batches.order import Batches
from lowrank.errors import InputError
from lowrank.models import Head, load_model, load_tokenizer, new_modules
from lowrank.recipes.parts.starting import folder_of
from lowrank.training.diagnosis import refuse_broken_weights
from lowrank.weights import load as load_onto

EVA_BATCHES = 8


def base_tokenizer(
    section: ModelSection, chat_template: str | None, adapter: Path | None = None
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or the one beside an adapter; with a chat template of the config's.

    A template that writes no generation prompt is made to write one.
    """
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        str(adapter) if own else section.name_or_path,
        revision=None if own else section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    if chat_template is not None:
        use_template(tokenizer, chat_template)
    complete_template(tokenizer)
    return tokenizer


def base_model(
    section: ModelSection,
    quantization: QuantizationSection | None,
    device: str | None = None,
    head: Head | None = None,
) -> PreTrainedModel:
    """The base, quantised if the config says so, with a task's head; on `device`, or where the config wants it."""
    return load_model(
        section.name_or_path,
        dtype=section.dtype,
        quantization=_quantization_options(quantization),
        device=device or section.device,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        head=head,
    )


_OURS = {"quant_method", "bits", "bnb_4bit_compute_dtype"}


def _quantization_options(section: QuantizationSection | None) -> Mapping[str, Any] | None:
    """The quantiser's own options. In what products are computed is for `choose_products`."""
    if section is None:
        return None
    if section.bits is not None:
        return {"quant_method": section.quant_method, "bits": section.bits}
    return {"load_in_8bit": True} if section.load_in_8bit else section.model_dump(exclude=_OURS)


def put_in(
    model: PreTrainedModel,
    adapter: AdapterSection,
    base: ModelSection,
    plan: Batches,
    task_type: str | None = None,
    name: str = "default",
) -> None:
    """Puts the adapter in, or makes the model's own parameters trainable.

    Args:
        model: The base.
        adapter: What of it trains.
        base: Where the base was loaded from: an initialisation may ask for its weights as they were.
        plan: The training batches: an initialisation may look at some.
        task_type: peft's word for the task, whose head trains beside the adapter; None for the next token.
        name: The adapter's, on the model.
    """
    if isinstance(adapter, FullSection):
        # bf16 has too few digits for small updates: weights train in float32, products are in the dtype asked for.
        model.float().requires_grad_(True)
    elif isinstance(adapter, BiasSection):
        model.float().requires_grad_(False)
        biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
        if not biases:
            raise InputError(f"{type(model).__name__} has no biases to train", where="adapter.method")
        for bias in biases:
            bias.requires_grad_(True)
    elif base.adapter is not None:
        load_onto(model, folder_of(base.adapter), name, trainable=True)
    else:
        config = adapter_config(adapter)
        if task_type is not None:
            saved = list(dict.fromkeys([*(config.modules_to_save or []), *new_modules(model)])) or None
            update = {"task_type": task_type, "modules_to_save": saved, **_without_pooler(model, config)}
            config = config.model_copy(update=update)
        wrap(model, config, name, batches=_eva_batches(adapter, plan), originals=_originals(adapter, base))


def _without_pooler(model: PreTrainedModel, config: AdapterConfig) -> dict[str, Any]:
    """A bare base's pooler computes nothing that an embedding is made of: it gets no adapter."""
    idle = [path for path, one in model.named_modules() if path.startswith("pooler.") and [*one.parameters(False)]]
    named = config.target_modules != "all-linear" or isinstance(config.exclude_modules, str)
    if model.base_model is not model or not idle or named:
        return {}
    return {"exclude_modules": [*(config.exclude_modules or []), *idle]}


def swap_attention(model: PreTrainedModel, section: ModelSection, *, packing: bool) -> AttentionChoice:
    """The attention backend; where packs will be trained on, the proof that their segments do not see one another."""
    choice = set_attention(model, section.attention, packing=packing)
    if packing:
        try:
            check_packing(model)
        except InputError:
            refuse_broken_weights(model, section.name_or_path)  # with NaN in them everything differs
            raise
    return choice


def adapter_config(section: MethodSection) -> AdapterConfig:
    """The section without `method`: what the adapter layer and peft's files know."""
    return METHODS[section.method].config.model_validate(section.model_dump(exclude={"method"}))


def _eva_batches(section: AdapterConfig, plan: Batches) -> list[dict[str, torch.Tensor]] | None:
    if getattr(section, "init_lora_weights", None) != "eva":
        return None
    plan = plan.without_sharing()  # what examples share would count once, and the model is not told of segments
    batches = [batch.built() for batch in islice(plan.upcoming(0), EVA_BATCHES)]
    return [{"input_ids": batch.input_ids, "position_ids": batch.position_ids} for batch in batches]


def _originals(section: AdapterConfig, base: ModelSection) -> Callable[[str], torch.Tensor] | None:
    if getattr(section, "init_lora_weights", None) != "loftq":
        return None
    dense = load_model(base.name_or_path, revision=base.revision, device="cpu").state_dict()
    return dense.__getitem__
