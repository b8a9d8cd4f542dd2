"""The packs that `packing.segments` announces, for those who make masks; and their masks, where segments have parents.

transformers sees in the position_ids where a segment restarts, but not whose child it is. So the functions which make
the masks of its own implementations are wrapped: under the announcement of a pack whose segments have parents, they are
handed a mask function that says the forest, and turn it into what their attention takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface

from lowrank.attention.maskparts import CAUSAL, WINDOW, parts_of
from lowrank.attention.spans import Spans, from_lengths
from lowrank.errors import InputError


@dataclass(eq=False)
class Announced:
    """One pack.

    Attributes:
        lengths: Tokens of each segment.
        parents: Number of each segment's parent, or -1; None: no segment has one.
        called: Whether the model's latest call was given the pack's tokens.
        asked: Whether the model has made a mask of it.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...] | None
    called: bool = False
    asked: bool = False


# By id of the config that transformers hands to the mask function. Not thread-local: gradient checkpointing recomputes
# on autograd's threads.
ANNOUNCED: dict[int, Announced] = {}


def announced_spans(
    config: object,
    batch: int,
    length: int,
    attention_mask: torch.Tensor | None,
    mask_function: Callable[..., torch.Tensor],
    window: int | None,
) -> Spans | None:
    """The spans of the pack announced for a config, if a mask of `batch` rows of `length` tokens is the pack's.

    None as well where the mask is more than causal within segments and `window`.

    Raises:
        InputError: The mask is more than that, and the pack's segments have parents.
    """
    found = ANNOUNCED.get(id(config))
    if found is None or attention_mask is not None or batch != 1 or length != sum(found.lengths):
        return None
    parts = parts_of(mask_function)
    if parts <= CAUSAL and (WINDOW in parts) == (window is not None):
        found.asked = True
        return from_lengths(found.lengths, window, found.parents)
    if found.parents is not None:
        raise InputError(
            f"this model's masks are more than causal ({', '.join(sorted(parts - CAUSAL)) or 'a window of its own'}), "
            "and beginnings of examples cannot be shared under them",
            fix="Give each example a segment of its own.",
        )
    return None


SHARING = ("eager", "sdpa", "lowrank_flex")
"""transformers' names of implementations whose masks are made from any mask function."""


def share_masks() -> None:
    """Wrap the functions that make masks for `SHARING`; what they make of other calls stays as it was."""
    known = AttentionMaskInterface()
    for name in SHARING:
        if name in known and not hasattr(known[name], "__wrapped__"):
            AttentionMaskInterface.register(name, _sharing(known[name]))


def _sharing(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def mask(batch_size: int, q_length: int, kv_length: int, *offsets: Any, **asked: Any) -> Any:
        told = ANNOUNCED.get(id(asked.get("config")))
        if told is None or told.parents is None or q_length != kv_length:
            return make(batch_size, q_length, kv_length, *offsets, **asked)
        spans = announced_spans(
            asked["config"],
            batch_size,
            q_length,
            asked.get("attention_mask"),
            asked["mask_function"],
            asked.get("local_size"),
        )
        if spans is not None:
            function = spans.mask_function(asked.get("device", "cpu"))
            asked = {**asked, "mask_function": function, "allow_is_causal_skip": False}
        return make(batch_size, q_length, kv_length, *offsets, **asked)

    return mask
