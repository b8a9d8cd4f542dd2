"""Rows that an encoder of their own makes into tokens: those to train on, and those held out."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lowrank.config.sections import DataSection
from lowrank.data import Examples
from lowrank.data.loading.load import first_rows, split_by_hash
from lowrank.recipes.parts.batches import sources_of
from lowrank.tasks.reading import Encoder, read_task_rows


def encoded_rows(
    data: DataSection, encode: Encoder, tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, Examples | None]:
    """The rows to train on, and those held out: a share of them, those that the config names, or None.

    Args:
        data: What is read.
        encode: A row to tokens.
        tokenizer: Of the model.

    Raises:
        InputError: a row cannot be used.
    """

    def read(sources: object, count: int | None) -> Examples:
        return read_task_rows(
            sources_of(sources),
            encode,
            tokenizer,
            max_length=data.max_length,
            too_long=data.too_long,
            bad_rows=data.bad_rows,
            columns=data.columns,
            transform=data.transform,
            max_rows=count,
        )

    train = read(data.train, data.max_train_rows)
    if isinstance(data.eval, float):
        train, held_out = split_by_hash(train, data.eval)
        return train, held_out if data.max_eval_rows is None else first_rows(held_out, data.max_eval_rows)
    return train, None if data.eval is None else read(data.eval, data.max_eval_rows)
