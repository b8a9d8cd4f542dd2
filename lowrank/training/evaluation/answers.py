"""Generated answers, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lowrank.attention.paged import generate_paged, paged_is_faster
from lowrank.training.evaluation.begun import Begun
from lowrank.training.evaluation.greedy import can_continue_rows, can_share, contiguous_head, continue_rows, padded


@torch.no_grad()
def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to all prompts, in their order, by the fastest way that this model and this machine have.

    An answer ends at the model's end tokens or at the tokenizer's.

    Args:
        model: A causal language model; it is in eval mode meanwhile.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time, where they go in batches.
        on_batch: Told how many answers have been added.
    """
    was_training = model.training
    model.eval()
    answers = [""] * len(prompts)
    with greedy(model, tokenizer, max_new_tokens) as config:
        for chosen, rows in _answered(model, prompts, config, batch_size):
            for i, row in zip(chosen, rows, strict=True):
                answers[i] = answer_text(tokenizer, up_to_end(row, config.eos_token_id))
            if on_batch is not None:
                on_batch(len(chosen))
    model.train(was_training)
    return answers


def _answered(
    model: Any, prompts: Sequence[Sequence[int]], generation: GenerationConfig, batch_size: int
) -> Iterator[tuple[Sequence[int], list[list[int]]]]:
    """(which prompts, the new tokens of each), until all are answered. Prompts that begin alike or are of like length
    share a batch."""
    if paged_is_faster(model):
        yield range(len(prompts)), generate_paged(model, prompts, generation, at_once=batch_size)
        return
    by_rows = can_continue_rows(model)
    begun = Begun(model, prompts, share=by_rows and can_share(model))
    with contiguous_head(model):
        for start in range(0, len(begun.order), batch_size):
            chosen = begun.order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            if by_rows:
                yield chosen, continue_rows(model, batch, generation, [begun.of(i) for i in chosen])
            else:
                yield chosen, _generated(model, batch, generation)


def _generated(model: Any, prompts: Sequence[Sequence[int]], generation: GenerationConfig) -> list[list[int]]:
    """By transformers' own loop, which knows every model."""
    ids, mask = padded(prompts, [0] * len(prompts), generation.pad_token_id, model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=generation)
    return output[:, ids.shape[1] :].tolist()


@contextmanager
def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """What to generate with for greedy answers and nothing else.

    `generate` fills gaps in the config that it is given from the model's own, which may hold a repetition penalty or
    the like: the model's is put aside meanwhile.
    """
    own = model.generation_config
    configured = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({token for token in [*configured, tokenizer.eos_token_id] if token is not None})
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
    finally:
        model.generation_config = own


def up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens of an answer before the first that ends it."""
    return next((row[:i] for i, token in enumerate(row) if token in ends), row)


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """What the tokens of an answer say, without the special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
