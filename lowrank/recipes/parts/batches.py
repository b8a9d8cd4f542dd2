"""Rows to batches, as a config's data and training sections say."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank.config.sections import DataSection, SourceSection, TrainingSection
from lowrank.data import (
    BatchPlan,
    BatchStream,
    Examples,
    check_fits,
    check_supervision,
    load_examples,
    load_train_eval,
    plan_batches,
    stream_batches,
)
from lowrank.data.batches.order import Batches
from lowrank.data.examples.token_table import Outcome
from lowrank.errors import InputError
from lowrank.models import positions_of, vocabulary_of
from lowrank.recipes.parts.sharing import if_worth_it
from lowrank.training.machine.ranks import ALONE, Ranks
from lowrank.training.steps import StepSize

SAMPLE_ROWS = 500


def read_batches(
    data: DataSection,
    training: TrainingSection,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks = ALONE,
    drawn: str | None = None,
) -> tuple[Batches, BatchPlan | None]:
    """The training batches, and those held out (None where the config names none); their supervision is proved.

    Args:
        data: What is read.
        training: How large batches are.
        tokenizer: Of the model.
        ranks: The processes that share the batches of a step.
        drawn: What draws at random for each example: with it no beginnings are shared unless that is asked for.
    """
    if data.streaming:
        plan, held_out = _stream(data, training, tokenizer, ranks, drawn), _read_held_out(data, tokenizer)
    else:
        examples, held_out = read_examples(data, tokenizer)
        plan = batch_plan(data, training, examples, tokenizer, ranks, drawn)
    if held_out is None:
        return plan, None
    return plan, evaluation_plan(data, training, held_out, tokenizer)


def read_examples(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, Examples | None]:
    """The examples to train on and those held out (None where the config names none), their supervision proved."""
    train, held_out = load_train_eval(
        sources_of(data.train),
        data.eval if isinstance(data.eval, float) else sources_of(data.eval),
        tokenizer,
        **_as_read(data),
        max_train_rows=data.max_train_rows,
        max_eval_rows=data.max_eval_rows,
    )
    for examples in (train, held_out):
        if examples is not None:
            check_supervision(examples, tokenizer)
    return train, held_out


def _as_read(data: DataSection) -> dict[str, Any]:
    """How rows become examples, whoever reads them."""
    return {
        "train_on": data.train_on,
        "max_length": data.max_length,
        "too_long": data.too_long,
        "format": data.format,
        "columns": data.columns,
        "transform": data.transform,
        "bad_rows": data.bad_rows,
        "today": data.date,
    }


def _read_held_out(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Examples | None:
    """The examples held out from a stream, which has them in files of their own."""
    if data.eval is None:
        return None
    held_out = load_examples(
        sources_of(data.eval),
        tokenizer,
        **_as_read(data),
        max_rows=data.max_eval_rows,
    )
    check_supervision(held_out, tokenizer)
    return held_out


def _stream(
    data: DataSection, training: TrainingSection, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, drawn: str | None
) -> BatchStream:
    """The training batches as a stream, its first rows' supervision proved."""
    stream = stream_batches(
        sources_of(data.train),
        tokenizer,
        **_as_read(data),
        packing=data.packing,
        batch_size=training.per_device_train_batch_size,
        max_tokens=pack_tokens(data, training),
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
    )
    first = stream.sample(SAMPLE_ROWS)
    check_supervision(first, tokenizer)
    return stream.as_sampled(batch_plan(data, training, first, tokenizer, ranks, drawn))


def batch_plan(
    data: DataSection,
    training: TrainingSection,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks = ALONE,
    drawn: str | None = None,
) -> BatchPlan:
    """Examples in batches, shuffled for training; arguments as `read_batches`'."""
    undrawn = drawn is None or data.share_prefixes is True
    plan = plan_batches(
        examples,
        packing=data.packing,
        batch_size=training.per_device_train_batch_size,
        max_tokens=pack_tokens(data, training) if data.packing else None,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        share_prefixes=data.share_prefixes is not False and undrawn,
        step_tokens=_step_tokens(data, training, ranks),
        ranks=ranks.count,
    )
    if data.packing and data.share_prefixes == "auto" and drawn is not None:
        return plan.without_sharing(f"{drawn} draws for each")
    return if_worth_it(data.share_prefixes, plan)


def evaluation_plan(
    data: DataSection, training: TrainingSection, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> BatchPlan:
    """Examples in batches, in their order as far as that goes."""
    plan = plan_batches(
        examples,
        packing=data.packing,
        batch_size=training.per_device_eval_batch_size,
        max_tokens=pack_tokens(data, training) if data.packing else None,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        shuffle=False,
        share_prefixes=data.share_prefixes is not False,
    )
    return if_worth_it(data.share_prefixes, plan)


def pack_tokens(data: DataSection, training: TrainingSection) -> int:
    """Tokens that go through the model with one pack, where no example is longer."""
    return training.tokens_per_batch or data.max_length


def _step_tokens(data: DataSection, training: TrainingSection, ranks: Ranks) -> int:
    """Tokens of the examples of an optimiser step of packs, over all processes."""
    packs = training.gradient_accumulation_steps * ranks.count
    return training.tokens_per_step or packs * pack_tokens(data, training)


def step_size(data: DataSection, training: TrainingSection, ranks: Ranks, plan: Batches) -> StepSize:
    """By tokens or by batches, over all processes. Where examples share beginnings a pack may hold more of them: a step
    holds as many tokens of examples as it would without."""
    if training.tokens_per_step is not None:
        return StepSize(tokens=training.tokens_per_step)
    batches = training.gradient_accumulation_steps * ranks.count
    limited = plan.shares and not (isinstance(plan, BatchPlan) and plan.trees is not None)
    return StepSize(batches, _step_tokens(data, training, ranks) if limited else None)


def fitting(
    plan: Batches,
    held_out: BatchPlan | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Batches:
    """The training batches, proved to hold nothing that the model has no embedding or no position for; so are those
    held out. A stream proves each row as it is read.

    Raises:
        InputError: a row does not fit.
    """
    limits = vocabulary_of(model), positions_of(model)
    if isinstance(plan, BatchPlan) and plan.trees is not None:
        for one in (plan, held_out):
            if one is not None:
                refuse_what_does_not_fit(one.examples, tokenizer, model)
        return plan
    for examples in (plan.sample(SAMPLE_ROWS), *([] if held_out is None else [held_out.examples])):
        check_fits(examples, tokenizer, *limits)
    return plan.for_model(*limits)


def refuse_what_does_not_fit(examples: Examples, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises InputError for a token that the model has no embedding for, or a text longer than its positions."""
    check_fits(examples, tokenizer, vocabulary_of(model), None)
    table, positions = examples.table, positions_of(model)
    kept = examples.row_mask & (table.outcomes == Outcome.KEPT)
    over = np.flatnonzero(kept & (table.row_lengths > positions)) if positions is not None else []
    if len(over):
        raise InputError(
            f"the row has a text of {table.row_lengths[over[0]]} tokens, and the model has only {positions} positions",
            where=examples.rows.where(int(over[0])),
            fix=f"Set data.max_length: {positions}, and data.too_long to drop or truncate.",
        )


def sources_of(given: Any) -> Any:
    """The section's sources as the data room takes them."""
    if isinstance(given, list):
        return [source.model_dump() if isinstance(source, SourceSection) else source for source in given]
    return given
