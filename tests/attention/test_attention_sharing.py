"""Forests: segments that go on from others give what each example gives alone, or are refused."""

from __future__ import annotations

import functools

import architectures
import pytest
import tiny
import torch
import transformers
import zoo
from transformers import AttentionInterface, masking_utils, modeling_flash_attention_utils

from lowrank.attention import announced, check_sharing, flash, isolation, positions_of, segments, set_attention
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradient_checkpointing(name):
    model = zoo.adapted(name)
    set_attention(model, "segments")
    expected = zoo.forest(model)[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert max(zoo.difference(zoo.forest(model)[1], expected).values()) < 1e-6


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
    monkeypatch.setattr(isolation, "positions_of", lambda lengths, parents: list(range(sum(lengths))))
    with pytest.raises(InputError, match="shared, a layer's states differ by"):
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
    model.config._attn_implementation = "paged|sdpa"
    refusal = pytest.raises(InputError, match=r"`paged\|sdpa` cannot share the beginnings")
    with refusal, segments(model, (3, 2), (-1, 0)):
        pass
    with segments(model, (3, 2), (-1, -1)):
        pass


@pytest.mark.parametrize("name", ["llama", "mistral-window-16"])
def test_flash_is_handed_the_keys_of_the_paths(name, monkeypatch):
    """transformers' own way to the kernel, with what flash-attn documents computed by hand in its place."""

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, **asked):
        assert asked.pop("causal")
        width = asked.pop("window_size", (-1, -1))
        assert asked["max_seqlen_k"] == int(cu_seqlens_k.diff().max())
        assert asked["max_seqlen_q"] == int(cu_seqlens_q.diff().max())
        groups, outs = q.shape[1] // k.shape[1], []
        queries, keys = (x.split(offsets.diff().tolist()) for x, offsets in ((q, cu_seqlens_q), (k, cu_seqlens_k)))
        for one, other, values in zip(queries, keys, v.split(cu_seqlens_k.diff().tolist()), strict=True):
            behind = torch.arange(len(one))[:, None] + len(other) - len(one) - torch.arange(len(other))
            seen = (behind >= 0) & ((width[0] < 0) | (behind <= width[0]))
            other, values = (x.repeat_interleave(groups, 1) for x in (other, values))
            scores = torch.einsum("qhd,khd->hqk", one, other) * asked["softmax_scale"]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outs)

    def asked_of_it(**asked):
        window = asked.get("sliding_window")
        limits = {} if window is None else {"window_size": (window - 1, window - 1)}
        given = ("softmax_scale", "max_seqlen_q", "max_seqlen_k")
        return {name: asked[name] for name in given if name in asked} | limits | {"causal": True}

    def one_row(q, k, v, **asked):
        borders = torch.tensor([0, q.shape[1]])
        longest = {"max_seqlen_q": q.shape[1], "max_seqlen_k": q.shape[1]}
        return kernel(q[0], k[0], v[0], borders, borders, **longest, **asked)[None]

    functions = ((one_row, kernel, None, None, None), (asked_of_it, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: functions)
    model = zoo.adapted(name)
    alone = _alone(name, torch.float32)
    mapping = {cls: dict(cls._global_mapping) for cls in (AttentionInterface, masking_utils.AttentionMaskInterface)}
    try:
        flash.register("flash_attention_2")
        model.config._attn_implementation = "flash_attention_2"
        check_sharing(model)
        assert max(zoo.difference(zoo.forest(model)[1], alone).values()) < 1e-5
    finally:
        for cls, before in mapping.items():
            cls._global_mapping.update(before)


def test_a_model_that_makes_its_masks_itself_is_refused(monkeypatch):
    model = zoo.build("llama")
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", lambda *a, **k: None)
    positions = torch.tensor([positions_of((3, 2), (-1, 0))])
    with segments(model, (3, 2), (-1, 0)), pytest.raises(InputError, match="it makes its masks itself, or needs none"):
        model(input_ids=zoo.examples((5,))[0], position_ids=positions, use_cache=False)


def test_a_model_with_positions_of_its_own_is_refused():
    with pytest.raises(InputError, match="shared, a layer's states differ by"):
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
