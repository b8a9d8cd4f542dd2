"""Prompts that begin alike: their beginning goes through the model once, however many go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lowrank.data.batches.beginnings import beginnings_of
from lowrank.training.evaluation.greedy import last_logits, new_cache


class Begun:
    """The keys and values of what prompts begin with, made when they are asked for.

    Attributes:
        order: The prompts so that those which begin alike come together, and what needs the most memory first.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], *, share: bool) -> None:
        """Looks for beginnings, where the model can `share` them; one token at least is left to each prompt."""
        self._model, self._prompts = model, prompts
        self._lengths = np.zeros(len(prompts), dtype=np.int64)
        places = np.zeros(len(prompts), dtype=np.int64)
        if share and len(prompts) > 1:
            alike = beginnings_of([np.asarray(prompt, dtype=np.int32) for prompt in prompts])
            with_next = np.append(alike.shared[1:], 0)
            left = np.array([len(prompts[at]) - 1 for at in alike.order])
            depths = np.minimum(np.maximum(alike.shared, with_next), left)
            self._lengths[alike.order] = depths
            # Of one place: those that have the same beginning and stand side by side.
            same = (depths[1:] == depths[:-1]) & (alike.shared[1:] >= depths[1:])
            places[alike.order] = np.cumsum(np.append(True, ~same))
        longest = np.zeros(len(prompts), dtype=np.int64)
        np.maximum.at(longest, places, [len(prompt) for prompt in prompts])
        self.order = sorted(range(len(prompts)), key=lambda at: (-longest[places[at]], places[at], -len(prompts[at])))
        self._latest: tuple[list[int], DynamicCache] | None = None

    def of(self, prompt: int) -> DynamicCache | None:
        """The keys and values, one row, of what a prompt has in common with others; None where that is nothing."""
        tokens = list(self._prompts[prompt][: int(self._lengths[prompt])])
        if not tokens:
            return None
        known, cache = self._latest or ([], None)
        if known != tokens:
            differ = [at for at, (one, other) in enumerate(zip(known, tokens, strict=False)) if one != other]
            kept = min([*differ, len(known), len(tokens) - 1])  # the model is given one token at least
            cache = _beginning(self._model, cache, kept)
            ids = torch.tensor([tokens[kept:]], device=self._model.device)
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits(self._model))
            self._latest = (tokens, cache)
        return cache


def _beginning(model: Any, cache: DynamicCache | None, tokens: int) -> DynamicCache:
    """A cache of its own with the first tokens of another one."""
    own = new_cache(model)
    for number, layer in enumerate(cache.layers if cache is not None and tokens else ()):
        assert isinstance(layer, DynamicLayer), "the model can share"
        assert layer.keys is not None, "tokens have gone through"
        assert layer.values is not None
        own.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], number)
    return own
