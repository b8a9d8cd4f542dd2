"""Forests: segments that go on from others give what each example gives alone, or are refused."""

from __future__ import annotations

import functools

import architectures
import pytest
import tiny
import torch
import transformers
import zoo
from transformers import masking_utils

from lowrank.attention import announced, check_sharing, packing, positions_of, segments, set_attention
from lowrank.attention.backends import BACKENDS
from lowrank.attention.setting import setting_of
from lowrank.attention.spans import from_lengths
from lowrank.errors import InputError

# Chunks are counted from the start of an example, and no mask of a forest says them.
CHUNKED = "llama4-chunk-16"
FORESTS = {
    "deep": (zoo.TREE, zoo.PARENTS),
    "one-child": ((9, 12), (-1, 0)),
    "many": ((21, 7, 30, 1, 7, 7, 18, 2, 40, 7, 3, 7), (-1, *[0] * 11)),
    "line": ((4, 5, 6, 1), (-1, 0, 1, 2)),
}


@functools.cache
def _model(name: str, dtype: torch.dtype):
    return zoo.adapted(name, dtype)


def _set_or_skip(model, backend: str) -> None:
    if BACKENDS[backend].refusal(setting_of(model, packing=True)) is not None:
        pytest.skip(f"{backend} cannot serve it")
    set_attention(model, backend, packing=True)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - {CHUNKED}))
def test_float32(name, backend):
    model = _model(name, torch.float32)
    _set_or_skip(model, backend)
    check_sharing(model)
    alone, shared = zoo.forest(model)
    errors = zoo.difference(shared, alone)
    assert max(errors.values()) < 1e-5, {k: v for k, v in errors.items() if v >= 1e-5}


@functools.cache
def _alone(name: str, dtype: torch.dtype) -> zoo.Result:
    model = _model(name, dtype)
    set_attention(model, "eager")
    return zoo.forest(model)[0]


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - {CHUNKED}))
def test_bfloat16(name):
    """Against examples alone in float32: at most 1.5 times as far off as packs may be, or as 16 bits put eager."""
    rounding = max(zoo.difference(_alone(name, torch.bfloat16), _alone(name, torch.float32)).values())
    model = _model(name, torch.bfloat16)
    set_attention(model, "segments", packing=True)
    check_sharing(model)
    errors = zoo.difference(zoo.forest(model)[1], _alone(name, torch.float32))
    allowed = 1.5 * max(2e-2, 1.5 * rounding)
    assert max(errors.values()) < allowed, {k: v for k, v in errors.items() if v >= allowed}


@pytest.mark.parametrize("name", ["llama", "mistral-window-16", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("shape", FORESTS)
def test_shapes(shape, name):
    model = _model(name, torch.float32)
    set_attention(model, "segments", packing=True)
    alone, shared = zoo.forest(model, *FORESTS[shape])
    assert max(zoo.difference(shared, alone).values()) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "segments"])
def test_chunks_are_refused(backend):
    model = _model(CHUNKED, torch.float32)
    set_attention(model, backend)
    with pytest.raises(InputError, match="it has layers of the kind chunked_attention"):
        check_sharing(model)


@pytest.mark.parametrize("backend", ["eager", "segments"])
def test_masks_that_are_more_than_causal_are_refused(backend):
    model = zoo.build("llama")
    set_attention(model, backend)
    own = masking_utils.create_causal_mask
    with pytest.MonkeyPatch.context() as patch:
        more = functools.partial(own, block_sequence_ids=torch.tensor([[0] * 22]))
        patch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", more)
        with pytest.raises(InputError, match="masks are more than causal"):
            check_sharing(model)


RECURRENT = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, expand=1
    ),
    "lfm2": lambda: transformers.Lfm2Config(**tiny._LLAMA_LIKE, layer_types=["conv", "full_attention"]),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **tiny._LLAMA_LIKE, layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8
    ),
}


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_mixers_are_refused(name, backend):
    model = tiny.build(RECURRENT[name]())
    if backend == "auto" or name != "mamba":
        set_attention(model, backend)
    with pytest.raises(InputError, match="cannot share the beginnings"):
        check_sharing(model)


def test_a_leak_between_branches_is_found(monkeypatch):
    """With a mask under which branches see one another, the self-test says so."""
    model = zoo.build("llama")
    set_attention(model, "segments")
    check_sharing(model)
    as_one = lambda lengths, window, parents: from_lengths(  # noqa: E731
        lengths, window, parents and (-1, *range(len(lengths) - 1))
    )
    monkeypatch.setattr(announced, "from_lengths", as_one)
    with pytest.raises(InputError, match="one example changes the logits of another"):
        check_sharing(model)


def test_lost_positions_are_found(monkeypatch):
    """gpt2's positions are learned: with those of another example the logits are others."""
    model = zoo.build("gpt2")
    set_attention(model, "segments")
    check_sharing(model)
    monkeypatch.setattr(packing, "positions_of", lambda lengths, parents: list(range(sum(lengths))))
    with pytest.raises(InputError, match="shared, the logits differ by"):
        check_sharing(model)


def test_positions_go_on_from_the_parent():
    assert positions_of((3, 2, 3, 1), (-1, 0, 0, 2)) == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert positions_of((3, 2)) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("parents", "what"),
    [((-1, 1), "segment 1 has the parent 1"), ((0, -1), "segment 0"), ((-1, -2), "segment 1"), ((-1,), "1 parents")],
)
def test_parents_that_are_no_earlier_segments(parents, what):
    model = zoo.build("llama")
    with pytest.raises(InputError, match=what), segments(model, (2, 2), parents):
        pass


def test_a_forest_without_positions_is_refused():
    model = zoo.build("llama")
    ids = zoo.examples((5,))[0]
    for backend in ("eager", "segments"):
        set_attention(model, backend)
        with segments(model, (3, 2), (-1, 0)), pytest.raises(InputError, match="without position_ids"):
            model(input_ids=ids, use_cache=False)


def test_a_backend_that_knows_no_forest_is_refused():
    model = zoo.build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(InputError, match="`flash_attention_2` cannot share the beginnings"),
        segments(model, (3, 2), (-1, 0)),
    ):
        pass
    with segments(model, (3, 2), (-1, -1)):
        pass


def test_a_model_that_makes_its_masks_itself_is_refused(monkeypatch):
    model = zoo.build("llama")
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", lambda *a, **k: None)
    positions = torch.tensor([positions_of((3, 2), (-1, 0))])
    with segments(model, (3, 2), (-1, 0)), pytest.raises(InputError, match="it makes its masks itself, or needs none"):
        model(input_ids=zoo.examples((5,))[0], position_ids=positions, use_cache=False)


def test_a_model_with_positions_of_its_own_is_refused():
    with pytest.raises(InputError, match="shared, the logits differ by"):
        check_sharing(architectures.MODELS["bloom"]())


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
def test_other_calls_under_the_announcement_are_as_ever(backend):
    model = zoo.build("llama")
    set_attention(model, backend)
    row = zoo.examples((9,))[0]
    expected = model(input_ids=row, use_cache=False).logits
    with segments(model, (3, 4), (-1, 0)):
        assert torch.equal(model(input_ids=row, use_cache=False).logits, expected)
    assert torch.equal(model(input_ids=row, use_cache=False).logits, expected)
