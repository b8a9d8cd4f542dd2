"""What the self-test and the announcement of segments promise, and what a layer may ask of `segments`."""

from __future__ import annotations

import threading
import types

import pytest
import tiny
import torch
import zoo
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank.attention import check_packing, flash, packing, segments, set_attention, strips
from lowrank.attention.announced import ANNOUNCED
from lowrank.attention.mask import SpansMask
from lowrank.attention.segmentwise import segments_attention
from lowrank.attention.spans import Spans, from_lengths
from lowrank.errors import InputError


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_gradient_checkpointing(name, reentrant):
    model = zoo.adapted(name)
    set_attention(model, "segments")
    expected = zoo.packed(model, zoo.examples())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    result = zoo.packed(model, zoo.examples())
    assert max(zoo.difference(result, expected).values()) < 1e-6


def test_the_backward_pass_may_run_on_another_thread_and_after_the_announcement():
    model = zoo.adapted("llama")
    set_attention(model, "segments")
    rows = zoo.examples()
    expected = zoo.packed(model, rows)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    real_backward, threads = torch.Tensor.backward, []

    def elsewhere(loss: torch.Tensor) -> None:
        threads.append(threading.Thread(target=real_backward, args=(loss,)))
        threads[-1].start()
        threads[-1].join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", elsewhere)
        result = zoo.packed(model, rows)
    assert threads
    assert max(zoo.difference(result, expected).values()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_autocast(name):
    """Weights in float32, products in bfloat16: rotations leave queries in float32 and values in bfloat16."""
    model, rows = zoo.adapted(name), zoo.examples()
    lengths = [row.shape[1] for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def gradients() -> torch.Tensor:
        model.zero_grad()
        with segments(model, lengths):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
            (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    set_attention(model, "segments", packing=True)
    found = gradients()
    exact = zoo.difference({"": found}, {"": _in_float32(model, rows)})[""]
    assert exact < 5e-2


def _in_float32(model, rows) -> torch.Tensor:
    set_attention(model, "eager")
    model.zero_grad()
    for row in rows:
        out = model(input_ids=row, use_cache=False).logits
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_an_announcement_ends():
    model = tiny.tiny_llama()
    set_attention(model, "segments")
    announcement = segments(model, [3, 4])
    announcement.__enter__()
    assert {told.lengths for told in ANNOUNCED.values()} == {(3, 4)}
    assert "warn_if_padding_and_no_attention_mask" in vars(model)
    assert not announcement.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not ANNOUNCED
    assert "warn_if_padding_and_no_attention_mask" not in vars(model)
    with segments(model, None):
        assert not ANNOUNCED


def test_announced_packs_of_another_length_are_looked_at():
    """Inside `segments`, a call with other tokens (an evaluation, say) is not taken for the pack."""
    model = zoo.build("llama")
    set_attention(model, "segments")
    row = zoo.examples((9,))[0]
    expected = model(input_ids=row, use_cache=False).logits
    with segments(model, [3, 4]):
        assert torch.equal(model(input_ids=row, use_cache=False).logits, expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
@pytest.mark.parametrize(
    "asked",
    [{"use_cache": False, "attention_mask": torch.ones(1, 9, dtype=torch.long)}, {"use_cache": True}, {}],
    ids=["mask", "cache", "default"],
)
def test_a_call_under_which_segments_see_one_another_is_refused(backend, asked):
    model = zoo.build("llama")
    set_attention(model, backend)
    row, positions = zoo.examples((9,))[0], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with segments(model, [5, 4]):
        model(row, position_ids=positions, use_cache=False)
        with pytest.raises(InputError, match="segments of a pack would see one another"):
            model(row, position_ids=positions, **asked)
        model(zoo.examples((8,))[0])  # another call, not of the pack
    model(row, position_ids=positions, **asked)


def test_rows_of_nothing_but_padding():
    """As other backends: numbers that nobody reads, and no failure."""
    model, row = zoo.build("llama"), zoo.examples((9,))[0]
    set_attention(model, "segments")
    logits = model(input_ids=row, attention_mask=torch.zeros_like(row), use_cache=False).logits
    logits.sum().backward()
    assert logits.isfinite().all()


def test_the_self_test_leaves_mode_and_random_state_alone():
    model = zoo.build("llama").train()
    set_attention(model, "segments")
    state = torch.get_rng_state()
    check_packing(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def _layer(**asked) -> torch.Tensor:
    torch.manual_seed(0)
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
    query, key, value = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    return segments_attention(module, query, key, value, **asked)[0]


MASK = SpansMask(Spans(1, 7, ((0, 3), (3, 7))), "cpu")


def test_a_layer_that_asks_for_more_is_refused_by_name():
    with pytest.raises(InputError, match="asks its attention for indices, which `segments` does not know"):
        _layer(attention_mask=MASK, indices=torch.zeros(1))
    _layer(attention_mask=MASK, sliding_window=4096, position_ids=torch.zeros(1), output_attentions=False)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_the_square_path_equals_the_spans(softcap, sinks):
    """Where the mask is no spans the same layer gives the same result, soft-capping and sinks included."""
    over_spans = _layer(attention_mask=MASK, softcap=softcap, s_aux=sinks)
    squared = _layer(attention_mask=MASK.spans.square(torch.device("cpu")), softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(over_spans, squared)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_places_of_a_static_cache_that_nothing_fills_yet_are_not_seen(softcap, sinks):
    """transformers leaves the mask out there: the first query is the first key's."""
    torch.manual_seed(0)
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    found, _ = segments_attention(module, q, k, v, None, softcap=softcap, s_aux=sinks)
    expected, _ = segments_attention(module, q, k[:, :, :5], v[:, :, :5], None, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(found, expected)


def test_a_position_bias_is_honoured():
    bias = torch.randn(1, 4, 7, 7)
    biased = _layer(attention_mask=MASK, position_bias=bias)
    squared = _layer(attention_mask=MASK.spans.square(torch.device("cpu")), position_bias=bias)
    torch.testing.assert_close(biased, squared)
    assert not torch.allclose(biased, _layer(attention_mask=MASK))
    capped = _layer(attention_mask=MASK, position_bias=bias, softcap=1e6)
    torch.testing.assert_close(capped, biased, rtol=1e-4, atol=1e-4)


def test_dropout_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    exact = _layer(attention_mask=MASK)
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
    torch.manual_seed(0)
    qkv = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    drawn = torch.stack([segments_attention(module, *qkv, MASK, dropout=0.3)[0] for _ in range(2000)])
    assert not torch.allclose(drawn[0], drawn[1])
    assert (drawn.mean(0) - exact).abs().max() < 0.2


def test_flash_is_handed_the_borders(monkeypatch):
    """transformers' FlashAttention path takes packs as arguments of the model call: they reach every layer."""
    model, seen = tiny.tiny_llama(), []

    def attention(module, query, key, value, attention_mask, **arguments):
        seen.append(arguments)
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr(packing, "is_flash_attention_requested", lambda config: True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", attention)
    model.config._attn_implementation = "flash_attention_2"
    ids = torch.cat(zoo.examples((5, 2, 4)), dim=1)
    with segments(model, [5, 2, 4]):
        model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)
    inside, outside = seen[:2], seen[2:]
    for arguments in inside:
        assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 5, 7, 11]
        assert arguments["cu_seq_lens_q"].dtype == torch.int32
        assert arguments["max_length_q"] == arguments["max_length_k"] == 5
    assert not any("cu_seq_lens_q" in arguments for arguments in outside)


def test_memory_of_attention_with_checkpointing_grows_linearly():
    """What one checkpointed step keeps and computes at once grows with the tokens, not with their square."""

    def largest_and_kept(length: int) -> tuple[int, int]:
        model = zoo.build("llama").train()
        set_attention(model, "segments")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        sizes: list[int] = []
        kept: list[int] = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
                return out

        ids = torch.randint(3, tiny.VOCAB, (1, length))
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
        with hooks, Sizes():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.sum().backward()
        return max(sizes), sum(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "SCORES_AT_ONCE", 1 << 12)
        patch.setattr(strips, "LONGEST_STRIP", strips.STRIP)  # strips grow up to it; sooner here than at 4096 tokens
        small, large = largest_and_kept(512), largest_and_kept(2048)
    assert large[0] <= 4.1 * small[0]
    assert large[1] <= 4.1 * small[1]


def test_packing_arguments():
    arguments = flash.packing_arguments(from_lengths([2, 7, 1], None), torch.device("cpu"))
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 2, 9, 10]
    assert arguments["max_length_k"] == 7
    assert "key_paths" not in arguments
