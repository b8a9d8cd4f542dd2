"""Announced batches are computed as others are, and nothing is asked about what the announcement says."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import masking_utils

from lowrank.attention import segments, segmentwise, set_attention
from lowrank.attention.announced_rows import ROWS, PaddedRows

NAMES = ["llama", "mistral-window-16", "gemma2", "gemma3", "gpt_oss", "gpt2", "opt"]


@pytest.fixture
def looked(monkeypatch):
    """How often the spans of a mask were looked for, and whether position_ids restart."""
    seen = []

    def counted(function):
        def call(*args):
            seen.append(function.__name__)
            return function(*args)

        return call

    monkeypatch.setattr(segmentwise, "from_mask_function", counted(segmentwise.from_mask_function))
    return seen


def logits(model, ids, mask, lengths):
    announced = None if lengths is None else PaddedRows(mask, lengths)
    with torch.no_grad(), segments(model, None, padded=announced):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return out[mask.bool()]


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows(name, looked):
    model, (ids, mask) = zoo.build(name), zoo.pad(zoo.examples(), "right")
    set_attention(model, "eager")
    expected = logits(model, ids, mask, None)
    set_attention(model, "segments")
    for _ in range(2):
        found = logits(model, ids, mask, zoo.LENGTHS)
        assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not looked
    assert not ROWS
    logits(model, ids, mask, None)
    assert looked


def test_chunks_are_looked_for(looked):
    model, (ids, mask) = zoo.build("llama4-chunk-16"), zoo.pad(zoo.examples(), "right")
    set_attention(model, "eager")
    expected = logits(model, ids, mask, None)
    set_attention(model, "segments")
    found = logits(model, ids, mask, zoo.LENGTHS)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert len(looked) == 1  # of two kinds of layers one has chunks


def test_what_is_announced_wrongly_is_looked_for(looked):
    """As of a model that changes its attention_mask: here it never was what the announcement says."""
    model, (ids, mask) = zoo.build("llama"), zoo.pad(zoo.examples(), "left")
    set_attention(model, "segments")
    expected = logits(model, ids, mask, None)
    assert torch.equal(logits(model, ids, mask, zoo.LENGTHS), expected)
    assert torch.equal(logits(model, ids, mask, zoo.LENGTHS), expected)
    assert len(looked) == 3


def test_a_call_with_another_mask_is_not_taken_for_the_rows(looked):
    model, (ids, mask) = zoo.build("llama"), zoo.pad(zoo.examples(), "right")
    set_attention(model, "segments")
    other = torch.ones_like(mask)
    expected = logits(model, ids, other, None)
    logits(model, ids, mask, zoo.LENGTHS)
    with torch.no_grad(), segments(model, None, padded=PaddedRows(mask, zoo.LENGTHS)):
        assert torch.equal(model(ids, attention_mask=other, use_cache=False).logits[other.bool()], expected)
    assert len(looked) == 2


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
@pytest.mark.parametrize(("lengths", "parents"), [([5, 4], None), ([9], None), ([4, 3, 2], [-1, 0, 1])])
def test_position_ids_of_a_pack(backend, lengths, parents, monkeypatch):
    """The masks are those of position_ids that nothing was announced of."""
    made = []
    find = masking_utils.find_packed_sequence_indices

    def noted(position_ids):
        made.append(find(position_ids))
        return made[-1]

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", noted)
    model = zoo.build("llama")
    set_attention(model, backend)
    places = [0, 1, 2, 3, 4, 0, 1, 2, 3] if lengths == [5, 4] else list(range(9))
    positions, ids = torch.tensor([places]), zoo.examples((9,))[0]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        asked = len(made)
        with segments(model, lengths, parents):
            found = model(ids, position_ids=positions, use_cache=False).logits
        assert (found - expected).norm() < 1e-5 * expected.norm()
        restart = lengths == [5, 4]
        assert len(made) == asked + (not restart and backend != "segments")
        asked = len(made)
        model(ids, position_ids=positions, use_cache=False)
    assert len(made) == asked + 1
