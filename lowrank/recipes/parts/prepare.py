"""The first half of a run, which training and evaluation share: model, adapter, data, as the config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank.adapters import AdaLoraConfig, LoraConfig, wrap
from lowrank.attention import AttentionChoice, check_packing, set_attention
from lowrank.config import RunConfig
from lowrank.config.sections import BiasSection, FullSection, QuantizationSection, SourceSection
from lowrank.data import (
    BatchPlan,
    BatchStream,
    Examples,
    check_fits,
    check_supervision,
    complete_template,
    end_tokens,
    load_examples,
    load_train_eval,
    plan_batches,
    stream_batches,
    use_template,
)
from lowrank.errors import InputError
from lowrank.models import load_model, load_tokenizer, positions_of, vocabulary_of
from lowrank.training.diagnosis import refuse_broken_weights

EVA_BATCHES = 8


def base_tokenizer(config: RunConfig, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or the one beside an adapter; with the chat template that the config gives it.

    A template that writes no generation prompt is made to write one.
    """
    section = config.model
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        str(adapter) if own else section.name_or_path,
        revision=None if own else section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    if config.data.chat_template is not None:
        use_template(tokenizer, config.data.chat_template)
    complete_template(tokenizer)
    return tokenizer


def base_model(config: RunConfig, device: str | None = None) -> PreTrainedModel:
    """The base, quantised if the config says so; on `device`, or where the config wants it."""
    section = config.model
    return load_model(
        section.name_or_path,
        dtype=section.dtype,
        quantization=quantization_options(config.quantization),
        device=device or section.device,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )


def quantization_options(section: QuantizationSection | None) -> Mapping[str, Any] | None:
    """bitsandbytes' own options."""
    if section is None:
        return None
    options = section.model_dump()
    return {"load_in_8bit": True} if section.load_in_8bit else options


SAMPLE_ROWS = 500


def stream_plan(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[BatchStream, Examples | None]:
    """The training batches as a stream, its first rows' supervision proved; and the examples held out."""
    data, training = config.data, config.training
    stream = stream_batches(
        _sources(data.train),
        tokenizer,
        train_on=data.train_on,
        max_length=data.max_length,
        too_long=data.too_long,
        format=data.format,
        columns=data.columns,
        bad_rows=data.bad_rows,
        today=data.date,
        packing=data.packing,
        batch_size=training.per_device_train_batch_size,
        max_tokens=training.tokens_per_batch or data.max_length,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
    )
    check_supervision(stream.sample(SAMPLE_ROWS), tokenizer)
    if data.eval is None:
        return stream, None
    held_out = load_examples(
        _sources(data.eval),
        tokenizer,
        train_on=data.train_on,
        max_length=data.max_length,
        too_long=data.too_long,
        format=data.format,
        columns=data.columns,
        bad_rows=data.bad_rows,
        today=data.date,
        max_rows=data.max_eval_rows,
    )
    check_supervision(held_out, tokenizer)
    return stream, held_out


def read_examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, Examples | None]:
    """The examples to train on and those held out (None where the config names none), their supervision proved."""
    section = config.data
    train, held_out = load_train_eval(
        _sources(section.train),
        section.eval if isinstance(section.eval, float) else _sources(section.eval),
        tokenizer,
        train_on=section.train_on,
        max_length=section.max_length,
        too_long=section.too_long,
        format=section.format,
        columns=section.columns,
        bad_rows=section.bad_rows,
        today=section.date,
        max_train_rows=section.max_train_rows,
        max_eval_rows=section.max_eval_rows,
    )
    for examples in (train, held_out):
        if examples is not None:
            check_supervision(examples, tokenizer)
    return train, held_out


def ends_of(plan: BatchPlan | BatchStream, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end trained turns; of a stream, those of its first rows."""
    examples = plan.sample(SAMPLE_ROWS) if isinstance(plan, BatchStream) else plan.examples
    return end_tokens(examples, tokenizer)


def fitting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: BatchPlan | BatchStream | None,
    held_out: Examples | None,
) -> Any:
    """The plan, proved to hold nothing that the model has no embedding or no position for; so are the rows held out.

    Raises:
        InputError: a row does not fit.
    """
    limits = vocabulary_of(model), positions_of(model)
    planned = plan.sample(SAMPLE_ROWS) if isinstance(plan, BatchStream) else None if plan is None else plan.examples
    for examples in filter(None, (planned, held_out)):
        check_fits(examples, tokenizer, *limits)
    return plan.for_model(*limits) if isinstance(plan, BatchStream) else plan


def _sources(given: Any) -> Any:
    """The section's sources as the data room takes them."""
    if isinstance(given, list):
        return [source.model_dump() if isinstance(source, SourceSection) else source for source in given]
    return given


def batch_plan(config: RunConfig, examples: Examples, tokenizer: Any, *, shuffle: bool) -> BatchPlan:
    """The order of the batches."""
    training = config.training
    return plan_batches(
        examples,
        packing=config.data.packing,
        batch_size=training.per_device_train_batch_size if shuffle else training.per_device_eval_batch_size,
        max_tokens=(training.tokens_per_batch or config.data.max_length) if config.data.packing else None,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        shuffle=shuffle,
    )


def put_in(model: PreTrainedModel, config: RunConfig, plan: BatchPlan | BatchStream) -> None:
    """Puts the adapter in, or makes the model's own parameters trainable."""
    adapter = config.adapter
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
    else:
        wrap(model, adapter_config(adapter), batches=_eva_batches(adapter, plan), originals=_originals(config))


def swap_attention(model: PreTrainedModel, config: RunConfig) -> AttentionChoice:
    """The attention backend; where packs will be trained on, the proof that their segments do not see one another."""
    choice = set_attention(model, config.model.attention, packing=config.data.packing)
    if config.data.packing:
        try:
            check_packing(model)
        except InputError:
            refuse_broken_weights(model, config.model.name_or_path)  # with NaN in them everything differs
            raise
    return choice


def adapter_config(section: LoraConfig | AdaLoraConfig) -> LoraConfig | AdaLoraConfig:
    """The section without `method`: what the adapter layer and peft's files know."""
    kind = AdaLoraConfig if isinstance(section, AdaLoraConfig) else LoraConfig
    return kind.model_validate(section.model_dump(exclude={"method"}))


def _eva_batches(
    section: LoraConfig | AdaLoraConfig, plan: BatchPlan | BatchStream
) -> list[dict[str, torch.Tensor]] | None:
    if section.init_lora_weights != "eva":
        return None
    assert isinstance(plan, BatchPlan), "the config has refused it"
    indices = plan.epoch(0)[:EVA_BATCHES]
    return [{"input_ids": batch.input_ids, "position_ids": batch.position_ids} for batch in map(plan.batch, indices)]


def _originals(config: RunConfig) -> Callable[[str], torch.Tensor] | None:
    if getattr(config.adapter, "init_lora_weights", None) != "loftq":
        return None
    dense = load_model(config.model.name_or_path, revision=config.model.revision, device="cpu").state_dict()
    return dense.__getitem__
