"""Generated answers, and whether they are right."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

_WORTH_SHARING = 16  # tokens


@torch.no_grad()
def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to all prompts, in their order.

    Prompts of like length share a batch. What all prompts begin with (the system prompt) goes through the model once,
    where the model allows it. An answer ends at the model's end tokens or at the tokenizer's.

    Args:
        model: A causal language model; it is in eval mode meanwhile.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time.
        on_batch: Told how many answers a batch has added.
    """
    was_training = model.training
    model.eval()
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    shared = shared_length(prompts) if can_share(model) else 0
    with greedy(model, tokenizer, max_new_tokens) as config:
        begun = begin_with(model, prompts[0][:shared]) if shared else None
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = padded([prompts[i] for i in chosen], shared, tokenizer.pad_token_id, model.device)
            past = {} if begun is None else {"past_key_values": repeated(begun, len(chosen))}
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **past)
            for i, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = str(tokenizer.decode(_until(row, config.eos_token_id), skip_special_tokens=True))
            if on_batch is not None:
                on_batch(len(chosen))
    model.train(was_training)
    return answers


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


def shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, one at least left to each; 0 where it is not worth the while."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what these two share, all share
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    same = min(same, min(map(len, prompts)) - 1)
    return same if same >= _WORTH_SHARING else 0


def can_share(model: Any) -> bool:
    """Whether padding may stand between a shared beginning and the rest: positions are told to the model, and no layer
    looks back a fixed number of places, padding counted."""
    told = "position_ids" in inspect.signature(type(model).forward).parameters
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return told and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def begin_with(model: Any, tokens: Sequence[int]) -> DynamicCache:
    """Keys and values of a beginning."""
    cache = DynamicCache(config=model.config.get_text_config())
    ids = torch.tensor([list(tokens)], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """A copy for `count` rows."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(count)
    return copied


def padded(
    prompts: Sequence[list[int]], shared: int, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (b, longest) each, padded behind the `shared` first tokens: all rows end alike."""
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[*prompt[:shared], *[pad] * gap, *prompt[shared:]] for prompt, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in ends), row)


def same_text(answer: str, expected: str) -> bool:
    """Equal but for white space at the ends."""
    return answer.strip() == expected.strip()


def same_json(answer: str, expected: str) -> bool:
    """Equal as JSON values: key order and layout do not matter, 3 is 3.0. An answer that is no JSON is wrong."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):  # "[[[[[[..." is what an untrained model may say
        return False
    return _same_value(value, json.loads(expected))


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)  # to Python, 1 == True


MATCHES: dict[str, Callable[[str, str], bool]] = {"text": same_text, "json": same_json}
"""`same(answer, expected)` by name."""
