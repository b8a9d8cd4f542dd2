"""Masks that are more than causal are recognised, and no short cut is taken past them."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import masking_utils

from lowrank.attention.announced import ANNOUNCED, Announced
from lowrank.attention.flash import flash_mask
from lowrank.attention.mask import SpansMask
from lowrank.attention.maskparts import CAUSAL, WINDOW, parts_of
from lowrank.attention.segmentwise import segments_mask
from lowrank.errors import InputError

CAUSAL_MASK = masking_utils.causal_mask_function
WINDOWED = masking_utils.sliding_window_causal_mask_function(3)
BLOCKS = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, -1, -1, 1, 1, -1]]))
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])


def packed(mask_function):
    segments = masking_utils.find_packed_sequence_indices(POSITIONS)
    return masking_utils.packed_sequence_compatibility_function(mask_function, POSITIONS, segments)


def without_the_third(b, h, q, k):
    """A hole that neighbours, borders and windows do not show."""
    return (q < 6) | (k != 2)


BEYOND = {
    "blocks": masking_utils.or_masks(CAUSAL_MASK, BLOCKS),
    "packed-blocks": masking_utils.or_masks(packed(CAUSAL_MASK), BLOCKS),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
    "a-caller-s": masking_utils.and_masks(CAUSAL_MASK, without_the_third),
}
WITHIN = {"causal": CAUSAL_MASK, "window": WINDOWED, "packed": packed(CAUSAL_MASK), "packed-window": packed(WINDOWED)}


@pytest.mark.parametrize("name", WITHIN)
def test_within(name):
    assert parts_of(WITHIN[name]) <= CAUSAL
    assert (WINDOW in parts_of(WITHIN[name])) == ("window" in name)


@pytest.mark.parametrize("name", BEYOND)
def test_beyond(name):
    assert not parts_of(BEYOND[name]) <= CAUSAL


@pytest.mark.parametrize("name", WITHIN)
def test_flash_takes_what_its_kernels_compute(name):
    real = torch.tensor([[False, *[True] * 8]])
    assert flash_mask(1, 9, 9, mask_function=WITHIN[name], attention_mask=None) is None
    assert torch.equal(
        flash_mask(batch_size=1, q_length=9, kv_length=9, mask_function=WITHIN[name], attention_mask=real), real
    )


@pytest.mark.parametrize("name", BEYOND)
def test_flash_refuses_what_it_would_drop(name):
    with pytest.raises(InputError, match="`flash` cannot serve this model's mask: it knows no"):
        flash_mask(1, 9, 9, mask_function=BEYOND[name], attention_mask=None)


@pytest.mark.parametrize("name", [*WITHIN, *BEYOND])
def test_an_announcement_does_not_hide_what_a_mask_says(name):
    """The announced lengths are taken for the mask only where the mask says no more than they do."""
    mask_function = {**WITHIN, **BEYOND}[name]
    window = 3 if "window" in name else 4 if name == "chunks" else None
    config = tiny.tiny_llama().config
    ANNOUNCED[id(config)] = Announced((5, 4), None)
    try:
        mask = segments_mask(
            1, 9, 9, mask_function=mask_function, local_size=window, config=config, allow_is_causal_skip=False
        )
    finally:
        del ANNOUNCED[id(config)]
    expected = masking_utils.sdpa_mask(1, 9, 9, mask_function=mask_function, allow_is_causal_skip=False)
    if name in ("causal", "window"):  # as of models whose masks take no notice of packs
        expected = expected & masking_utils.sdpa_mask(
            1, 9, 9, mask_function=packed(CAUSAL_MASK), allow_is_causal_skip=False
        )
    assert isinstance(mask, SpansMask) == (name in WITHIN or name == "chunks")
    assert torch.equal(mask & True, expected)
