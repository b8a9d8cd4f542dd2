"""The variable-length CUDA kernels: our side of their contract on CPU, the kernels themselves where there is a card."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lowrank.attention import varlen
from lowrank.attention.segmentwise import attend_spans
from lowrank.attention.spans import Spans, from_lengths
from lowrank.attention.strips import Rule
from lowrank.training.machine.determinism import deterministic_kernels

SPANS = {
    "pack": from_lengths([130, 3, 129, 40, 1], None),
    "window": from_lengths([130, 3, 129, 40, 1], 20),
    "forest": from_lengths([130, 3, 129, 40, 1, 7], None, (-1, 0, 0, 2, 3, -1)),
    "forest with a window": from_lengths([130, 3, 129, 40, 1, 7], 20, (-1, 0, 0, 2, 3, -1)),
    "padded": Spans(3, 70, ((0, 70), (75, 140), (140, 141))),
}


def _by_hand(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
    """What `varlen_attn` documents, one span after the other."""
    assert cu_seq_q.dtype == torch.int32
    assert q.shape[1] == k.shape[1], "heads were not repeated"
    assert max_q == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert max_k == int((cu_seq_k[1:] - cu_seq_k[:-1]).max())
    assert cu_seq_q[-1] == len(q)
    assert cu_seq_k[-1] == len(k)
    left, right = window_size
    assert right == 0
    outs = []
    borders = [list(pairwise(offsets.tolist())) for offsets in (cu_seq_q, cu_seq_k)]
    for queries, keys in zip(*borders, strict=True):
        count = queries[1] - queries[0], keys[1] - keys[0]
        # The last query is the last key's: flash-attn's masks are aligned to the bottom right corner.
        behind = torch.arange(count[0])[:, None] + count[1] - count[0] - torch.arange(count[1])
        seen = (behind >= 0) & ((left < 0) | (behind <= left))
        scores = torch.einsum("qhd,khd->hqk", q[slice(*queries)], k[slice(*keys)]) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v[slice(*keys)]))
    return torch.cat(outs)


def _by_hand_in_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return _by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def _by_hand_in_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def _by_hand_in_flash_attn(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert causal
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return _by_hand(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, (window_size[0], 0))


@pytest.mark.parametrize(
    ("kernel", "name", "stand_in"),
    [
        (varlen.torch_kernel, "_torch_varlen", _by_hand_in_2_11),
        (varlen.torch_kernel, "_torch_varlen", _by_hand_in_2_13),
        (varlen.flash_attn_kernel, "_flash_attn_varlen", _by_hand_in_flash_attn),
    ],
)
@pytest.mark.parametrize("spans", SPANS)
def test_kernels_are_called_as_they_document(spans, kernel, name, stand_in, monkeypatch):
    """Windows, borders, padding and grouped heads mean to the kernels what they mean to `strips`."""
    monkeypatch.setattr(varlen, name, lambda: stand_in)
    spans = SPANS[spans]
    rule = Rule(0.3, spans.window, None)
    torch.manual_seed(0)
    qkv = [torch.randn(spans.batch * spans.length, h, 16, requires_grad=True) for h in (6, 2, 2)]
    direction = torch.randn(spans.batch * spans.length, 6, 16)
    expected = attend_spans(*qkv, None, spans, rule)
    out = varlen.over_spans(*qkv, spans, rule, kernel)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads, of_strips = (torch.autograd.grad((x * direction).sum(), qkv) for x in (out, expected))
    torch.testing.assert_close(grads, of_strips, rtol=1e-4, atol=1e-4)


def test_flash_attn_is_deterministic_where_torch_is(monkeypatch):
    """torch's own kernel asks torch; flash-attn's has to be told."""
    monkeypatch.setattr(varlen, "_flash_attn_varlen", lambda: _by_hand_in_flash_attn)
    q, k, v = (torch.randn(303, h, 16) for h in (6, 2, 2))
    with deterministic_kernels(True):
        varlen.over_spans(q, k, v, SPANS["pack"], Rule(0.3, None, None), varlen.flash_attn_kernel)


def test_gradients_of_what_many_see_are_summed_in_32_bits():
    x = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    varlen.along(x, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert x.grad.item() == 1000  # in 16 bits 256 + 1 is 256


def test_the_installed_torch_has_the_parameters_that_we_give():
    attend = varlen._torch_varlen()
    if attend is None:
        pytest.skip("this torch has no varlen_attn that knows windows")
    assert "scale" in varlen.inspect.signature(attend).parameters


def test_on_cpu_there_is_no_kernel():
    q = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert varlen.kernel_for(q, q, None, Rule(1.0, None, None)) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("spans", SPANS)
def test_on_cuda_equals_strips_in_float32(spans, head_dim, softcap):
    spans = SPANS[spans]
    rule = Rule(head_dim**-0.5, spans.window, softcap)
    torch.manual_seed(0)
    tokens = spans.batch * spans.length
    qkv = [torch.randn(tokens, h, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (6, 2, 2)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    direction = torch.randn(tokens, 6, head_dim, device="cuda")
    out, expected = attend_spans(*qkv, None, spans, rule), attend_spans(*exact, None, spans, rule)
    assert (varlen.kernel_for(qkv[0], qkv[2], None, rule) is not None) == (
        softcap is None or varlen._flash_attn_varlen() is not None
    )
    assert (out - expected).norm() < 2e-2 * expected.norm()
    grads = torch.autograd.grad((out * direction).sum(), qkv)
    of_exact = torch.autograd.grad((expected * direction).sum(), exact)
    for grad, reference in zip(grads, of_exact, strict=True):
        assert (grad - reference).norm() < 2e-2 * reference.norm()
