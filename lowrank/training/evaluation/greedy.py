"""Greedy continuations of many prompts, a token for all rows in each pass through the model.

`generate` serves every model. Where no more than tokens, mask, positions and a cache of keys and values goes into a
step, `continue_rows` gives the same tokens for less:

    prompts   s s s s a a       s, what several begin with, goes through the model once, not once for each (`begun`);
              . . t t . b       rows are filled up before and behind it, so that all end alike;
    answers   x x x             a row that is done leaves the batch at once;
              y y y y y y       keys and values have room for the whole answer: a step writes its own and copies none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowrank.adapters.activation import keep_rows
from lowrank.ops.transfer import to_device


class RoomyLayer(DynamicLayer):
    """Keys and values (b, h, n, d) of one layer that stand in blocks with room for more tokens.

    transformers' own layer copies all it holds for every token that is added.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room  # tokens
        self.blocks: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens, and gives back views of all."""
        if self.blocks is None:
            self.lazy_initialization(key_states, value_states)
            self.blocks = (self._block(key_states), self._block(value_states))
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if stop > self.room:
            raise ValueError(f"there is room for {self.room} tokens, not for {stop}")
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            block[:, :, start:stop] = states
        self.keys, self.values = (block[:, :, :stop] for block in self.blocks)
        return self.keys, self.values

    def keep(self, count: int, places: torch.Tensor, rows: torch.Tensor) -> None:
        """The first `count` rows stay, at `places` (m,) among them what `rows` (m,) were; nothing else is copied."""
        assert self.blocks is not None
        stop = self.get_seq_length()
        for block in self.blocks:
            block[places, :, :stop] = block[rows, :, :stop]
        self.blocks = (self.blocks[0][:count], self.blocks[1][:count])
        self.keys, self.values = (block[:, :, :stop] for block in self.blocks)

    def _block(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(*states.shape[:2], self.room, states.shape[3])


class _UnaskedCache(DynamicCache):
    """A cache for a card, which transformers does not ask for each token whether the mask holds padding.

    It leaves the mask of a single token alone under caches that could be compiled, and reads nothing else from that.
    """

    @property
    def is_compileable(self) -> bool:
        """As if."""
        return True


def can_continue_rows(model: Any) -> bool:
    """Whether `continue_rows` knows all that goes into a step of this model, and can take rows out of its cache."""
    own_inputs = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    told = {"attention_mask", "position_ids", "past_key_values", "use_cache"} <= _arguments(model)
    kinds = {type(layer) for layer in new_cache(model).layers}
    return not own_inputs and told and bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def can_share(model: Any) -> bool:
    """Whether padding may stand between a shared beginning and the rest: no layer looks back a fixed number of places,
    padding counted."""
    return all(type(layer) is DynamicLayer for layer in new_cache(model).layers)


def continue_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    begun: Sequence[DynamicCache | None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and without the end token.

    Args:
        model: One that `can_continue_rows`.
        prompts: Token ids; all go through the model together.
        generation: `max_new_tokens`, `eos_token_id` (a list) and `pad_token_id`.
        begun: For each prompt the keys and values of what it begins with, one row, or None; where the model
            `can_share`.
    """
    assert generation.max_new_tokens is not None
    begun = begun or [None] * len(prompts)
    shared = [0 if cache is None else cache.get_seq_length() for cache in begun]
    ids, mask = padded(prompts, shared, generation.pad_token_id, model.device)
    columns = ids.shape[1]
    cache = _roomy_cache(model, begun, max(shared), columns + generation.max_new_tokens)
    mask = torch.nn.functional.pad(mask, (0, generation.max_new_tokens), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = frozenset(generation.eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts)))
    step = ids[:, max(shared) :]
    for stop in range(columns, columns + generation.max_new_tokens):
        logits = model(
            input_ids=step,
            attention_mask=mask[:, :stop],
            position_ids=positions[:, stop - step.shape[1] : stop],
            past_key_values=cache,
            use_cache=True,
            **last_logits(model),
        ).logits
        tokens = logits[:, -1].argmax(-1)
        chosen = tokens.tolist()  # the one wait for a card
        goes_on = [token not in ends for token in chosen]
        for row, token, more in zip(writing, chosen, goes_on, strict=True):
            if more:
                answers[row].append(token)
        if not any(goes_on):
            break
        if not all(goes_on):
            kept = _filled_up(goes_on)
            writing = [writing[row] for row in kept]
            rows = _keep(cache, kept, model.device)
            mask, positions, tokens = mask[rows], positions[rows], tokens[rows]
            keep_rows(model, kept)
        step = tokens[:, None]
    return answers


def _filled_up(goes_on: Sequence[bool]) -> list[int]:
    """The rows that go on, the last of them in the places of those that do not: the others stay where they are."""
    count = sum(goes_on)
    later = iter([row for row in range(count, len(goes_on)) if goes_on[row]])
    return [row if goes_on[row] else next(later) for row in range(count)]


def _keep(cache: DynamicCache, kept: Sequence[int], device: torch.device) -> torch.Tensor:
    """Takes rows out of a cache: row `i` becomes what row `kept[i]` was. Returns `kept` on the device."""
    places = [place for place, row in enumerate(kept) if place != row]
    moves = to_device(torch.tensor([places, [kept[place] for place in places]], dtype=torch.int64), device)
    rows = to_device(torch.tensor(kept), device)
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(len(kept), moves[0], moves[1])
        else:
            assert isinstance(layer, DynamicLayer), "rows of the model can be taken out"
            layer.batch_select_indices(rows)
    return rows


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """While it lasts the head is given contiguous states.

    Of a batch's last states, which lie apart, torch makes a product in which each row has its own copy of the matrix:
    40 rows of a vocabulary of 49,152 would copy 2.2 GiB.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def padded(
    prompts: Sequence[Sequence[int]], shared: Sequence[int], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (b, n) each: all prompts' `shared` first tokens end alike, and so their rests."""
    most, longest = max(shared), max(len(prompt) - own for prompt, own in zip(prompts, shared, strict=True))
    ids, mask = [], []
    for prompt, own in zip(prompts, shared, strict=True):
        before, gap, rest = most - own, longest - (len(prompt) - own), len(prompt) - own
        ids.append([*[pad] * before, *prompt[:own], *[pad] * gap, *prompt[own:]])
        mask.append([0] * before + [1] * own + [0] * gap + [1] * rest)
    return to_device(torch.tensor(ids), device), to_device(torch.tensor(mask), device)


def new_cache(model: Any) -> DynamicCache:
    """An empty one, of layers as the model has them."""
    return DynamicCache(config=model.config.get_text_config())


def _roomy_cache(model: Any, begun: Sequence[DynamicCache | None], shared: int, room: int) -> DynamicCache:
    """A cache for rows of at most `room` tokens, in which what has begun of each ends at place `shared`."""
    cache = (_UnaskedCache if model.device.type == "cuda" else DynamicCache)(config=model.config.get_text_config())
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    for number in range(len(cache.layers) if shared else 0):
        known = [(one if one is None else _keys_and_values(one, number)) for one in begun]
        first = next(pair for pair in known if pair is not None)
        states = [x.new_zeros(len(begun), x.shape[1], shared, x.shape[3]) for x in first]
        for row, pair in enumerate(known):
            for block, x in zip(states, pair or (), strict=False):
                block[row, :, shared - x.shape[2] :] = x[0]
        cache.update(states[0], states[1], number)
    return cache


def _keys_and_values(cache: DynamicCache, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = cache.layers[number]
    assert isinstance(layer, DynamicLayer), "the model can share"
    assert layer.keys is not None, "the beginning has gone through"
    assert layer.values is not None
    return layer.keys, layer.values


def last_logits(model: Any) -> dict[str, int]:
    """What a call is given for the logits of the last tokens alone, where the model can be told."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)
