"""Rows of preferences in batches: a tree each, the prompt once and a branch for each answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.config.sections import DataSection, TrainingSection
from lowrank.data import BatchPlan, Examples, plan_batches
from lowrank.data.batches.trees import Trees, Verdict
from lowrank.data.reading.judged import judged
from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.tokenise import Tokeniser
from lowrank.errors import InputError
from lowrank.recipes.parts.batches import pack_tokens
from lowrank.recipes.parts.encoded_rows import encoded_rows
from lowrank.tasks.reading import Encoded
from lowrank.training.losses.objective_kinds import OBJECTIVE_KINDS, ObjectiveKind


def read_preferences(
    data: DataSection, training: TrainingSection, tokenizer: PreTrainedTokenizerBase, drawn: str | None = None
) -> tuple[BatchPlan, BatchPlan | None]:
    """The training batches, and those held out (None where the config names none).

    Args:
        data: What is read.
        training: How large batches are, and what is learned.
        tokenizer: Of the model, with its chat template.
        drawn: What draws at random for each example: with it a prompt is computed for each answer, unless sharing is
            asked for.

    Raises:
        InputError: a row cannot be used; all answers are of one kind.
    """
    train, held_out = read_preference_examples(data, training, tokenizer)
    undrawn = drawn is None or data.share_prefixes is True
    why = None if undrawn or data.share_prefixes is False else f"{drawn} draws for each"
    plan = preference_plan(data, training, train, tokenizer, shuffle=True)
    plan = plan if undrawn and data.share_prefixes is not False else plan.without_sharing(why)
    if held_out is None:
        return plan, None
    held = preference_plan(data, training, held_out, tokenizer, shuffle=False)
    return plan, held if data.share_prefixes is not False else held.without_sharing()


def read_preference_examples(
    data: DataSection, training: TrainingSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, Examples | None]:
    """The rows to train on and those held out, as `read_preferences` takes them."""
    kind = OBJECTIVE_KINDS[training.objective]
    train, held_out = encoded_rows(data, _Encoder(kind, training, tokenizer, data), tokenizer)
    if not kind.paired:
        _refuse_one_kind(train)
    return train, held_out


def preference_plan(
    data: DataSection,
    training: TrainingSection,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shuffle: bool,
) -> BatchPlan:
    """Examples in batches; shuffled for training. A pack holds the longest tree, where the config sets no size."""
    kind = OBJECTIVE_KINDS[training.objective]
    trees = Trees(examples, paired=kind.paired, prompts=kind.prompts, mismatched=kind.mismatched(training.loss_type))
    longest = int(trees.lengths.max())
    room = max(pack_tokens(data, training), 0 if training.tokens_per_batch else longest)
    if data.packing and longest > room:
        raise InputError(
            f"the answers to one prompt take {longest} tokens, the prompt counted once, and a pack holds {room}",
            where="training.tokens_per_batch",
            fix=f"Raise it to {longest}, leave it out, or lower data.max_length.",
        )
    size = training.per_device_train_batch_size if shuffle else training.per_device_eval_batch_size
    plan = plan_batches(
        examples,
        packing=False,
        batch_size=size,
        max_tokens=None,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        shuffle=shuffle,
    )
    plan.packing, plan.max_tokens, plan.trees = data.packing, room if data.packing else None, trees
    return plan


class _Encoder:
    """A row to its answers' tokens, one after another, each behind the prompt."""

    def __init__(
        self, kind: ObjectiveKind, training: TrainingSection, tokenizer: PreTrainedTokenizerBase, data: DataSection
    ) -> None:
        self.kind, self.format = kind, data.format
        self.obeys_margins = (training.loss_type or kind.loss_types[0]) in kind.margins
        self.named = training.objective + (f" ({training.loss_type})" if training.loss_type else "")
        options = Options("completion", data.max_length, "error", today=data.date)
        self.tokeniser, self.has_template = Tokeniser(tokenizer, options), tokenizer.chat_template is not None

    def __call__(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Encoded:
        read = judged(row, self.format, self.has_template, paired=self.kind.paired)
        if read.margin is not None and not self.obeys_margins:
            raise RowError(
                f"the row has a margin, which {self.named} does not obey",
                "Leave the key out, by data.transform for example, or take training.objective: dpo.",
            )
        whole = [self.tokeniser.answer(one) for one in read.answers]
        _refuse_equal(whole, read.liked)
        cut = [(ids[:max_length], mask[:max_length]) for ids, mask in whole]
        if not all(mask.any() for _, mask in cut):
            cut = whole  # nothing is left of an answer: the row is too long, and is left out
        lengths = tuple(len(ids) for ids, _ in cut)
        return Encoded(
            np.concatenate([ids for ids, _ in cut]),
            np.concatenate([mask for _, mask in cut]),
            Verdict(lengths, read.liked, read.margin),
            cut=any(len(ids) < len(own) for (ids, _), (own, _) in zip(cut, whole, strict=True)),
            longest=max(lengths),
        )


def _refuse_equal(answers: list[tuple[np.ndarray, np.ndarray]], liked: tuple[bool, ...]) -> None:
    """Raises RowError where an answer is both wanted and not."""
    wanted = [ids for (ids, _), one in zip(answers, liked, strict=True) if one]
    for (ids, _), one in zip(answers, liked, strict=True):
        if not one and any(np.array_equal(ids, other) for other in wanted):
            raise RowError("chosen and rejected are the same", "Remove the row: there is nothing to tell apart in it.")


def _refuse_one_kind(examples: Examples) -> None:
    """Raises InputError where no answer is wanted, or all are."""
    said = {liked for at in range(len(examples)) for liked in examples.payload(at).liked}
    if len(said) < 2:
        raise InputError(
            f"every answer is labelled {str(next(iter(said))).lower()}",
            where=examples.rows.name,
            fix="Give answers of both kinds: those that are wanted, and others.",
        )
