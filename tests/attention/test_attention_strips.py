"""Attention in strips against the plain formula in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from lowrank.attention import span_kernels, strips
from lowrank.attention.segmentwise import attend_spans
from lowrank.attention.spans import Spans, from_lengths
from lowrank.attention.strips import Rule


def _formula(q, k, v, sinks, spans: Spans, rule: Rule) -> torch.Tensor:
    """softmax(q k^T) v over all pairs of tokens at once; the square of `spans`, which its own tests hold to account."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (
        q.transpose(0, 1),
        k.repeat_interleave(groups, 1).transpose(0, 1),
        v.repeat_interleave(groups, 1).transpose(0, 1),
    )
    scores = q @ k.transpose(1, 2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    square = torch.block_diag(*spans.square(torch.device("cpu"))[:, 0].float()).bool()
    scores = scores.masked_fill(~square, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return (weights[..., : k.shape[1]] @ v).transpose(0, 1)


def _inputs(tokens, heads, key_heads, d, e, sinks, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(tokens, heads, d), (tokens, key_heads, d), (tokens, key_heads, e)]
    made = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return [*made, torch.randn(heads, dtype=dtype, requires_grad=True) if sinks else None]


SPANS = {
    "one": lambda window: from_lengths([150], window),
    "pack": lambda window: from_lengths([130, 3, 129, 40, 1, 128], window),
    "padded": lambda window: Spans(3, 70, ((0, 70), (75, 140), (140, 141)), window),
    "forest": lambda window: from_lengths(
        [70, 9, 9, 9, 90, 1, 30, 33, 2, 41], window, (-1, 0, 0, 0, 1, 4, -1, 6, 6, 5)
    ),
}


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 100])
@pytest.mark.parametrize("spans", SPANS)
def test_equals_the_formula(spans, window, softcap, sinks, monkeypatch):
    monkeypatch.setattr(strips, "SCORES_AT_ONCE", 50_000)  # so that pairs are parted as well
    spans = SPANS[spans](window)
    q, k, v, s = _inputs(spans.batch * spans.length, 6, 2, 8, 4, sinks)
    rule = Rule(0.7, window, softcap)
    direction = torch.randn(spans.batch * spans.length, 6, 4, dtype=torch.float64)
    wanted = [x for x in (q, k, v, s) if x is not None]
    out, expected = attend_spans(q, k, v, s, spans, rule), _formula(q, k, v, s, spans, rule)
    torch.testing.assert_close(out, expected)
    grads, of_formula = (torch.autograd.grad((o * direction).sum(), wanted) for o in (out, expected))
    torch.testing.assert_close(grads, of_formula)


@pytest.mark.parametrize("window", [None, 9, 70])
def test_many_strips(window, monkeypatch):
    """Where there are many keys a strip meets more of them than it may see, and hides the rest."""
    monkeypatch.setattr(strips, "STRIP", 4)
    spans, rule = from_lengths([150, 67], window), Rule(0.7, window, None)
    q, k, v, s = _inputs(217, 4, 2, 8, 8, True)
    wanted, direction = (q, k, v, s), torch.randn(217, 4, 8, dtype=torch.float64)
    out, expected = attend_spans(q, k, v, s, spans, rule), _formula(q, k, v, s, spans, rule)
    torch.testing.assert_close(out, expected)
    grads, of_formula = (torch.autograd.grad((o * direction).sum(), wanted) for o in (out, expected))
    torch.testing.assert_close(grads, of_formula)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lengths", [[9, 5, 7], [20, 5, 7]], ids=["below-a-grain", "above"])
def test_gradients_of_keys_before_the_queries(lengths, window):
    spans, rule = from_lengths(lengths, window, (-1, 0, 0)), Rule(0.7, window, 2.0)
    inputs = _inputs(sum(lengths), 4, 2, 3, 2, True)
    assert torch.autograd.gradcheck(lambda q, k, v, s: attend_spans(q, k, v, s, spans, rule), inputs)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (4, 1), (9, 3)])
def test_heads(heads, key_heads):
    spans, rule = from_lengths([30, 29, 7], None), Rule(0.3, None, None)
    q, k, v, _ = _inputs(66, heads, key_heads, 16, 16, False)
    torch.testing.assert_close(attend_spans(q, k, v, None, spans, rule), _formula(q, k, v, None, spans, rule))


@pytest.mark.parametrize("ratio", [2.0, 0.5], ids=["strips", "torchs"])
@pytest.mark.parametrize("parents", [None, (-1, *[0] * 16)], ids=["pack", "forest"])
def test_keeps_no_more_than_its_inputs(parents, ratio, monkeypatch):
    """Between the passes nothing of size (queries x keys) stays, nor keys once for each span that sees them.

    Beside a long span its output does, which the layer after it keeps too, and a number for each head of its queries.
    """
    monkeypatch.setattr(span_kernels, "figure", lambda what, measure: ratio)
    spans, rule = from_lengths([512, *[16] * 16], None, parents), Rule(0.3, None, None)
    q, k, v, _ = _inputs(768, 2, 2, 8, 8, False, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_spans(q, k, v, None, spans, rule)
    long = q.numel() + 512 * 2 if ratio < 1 else 0
    assert sum(kept) <= q.numel() + k.numel() + v.numel() + long


@pytest.fixture
def _torchs_kernel(monkeypatch):
    """Takes spans of 32 tokens and more, whatever is faster here; in float64 too."""
    monkeypatch.setattr(span_kernels, "SHORTEST", 32)
    monkeypatch.setattr(span_kernels, "DTYPES", (torch.float32, torch.bfloat16, torch.float64))
    monkeypatch.setattr(span_kernels, "figure", lambda what, measure: 0.5)


@pytest.mark.usefixtures("_torchs_kernel")
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("spans", SPANS)
def test_span_kernels_equal_the_formula(spans, heads, key_heads):
    spans, rule = SPANS[spans](None), Rule(0.7, None, None)
    q, k, v, _ = _inputs(spans.batch * spans.length, heads, key_heads, 8, 8, False)
    assert span_kernels.by_torch(spans, q, k, v, None, rule)
    direction = torch.randn(q.shape, dtype=torch.float64)
    out, expected = attend_spans(q, k, v, None, spans, rule), _formula(q, k, v, None, spans, rule)
    torch.testing.assert_close(out, expected)
    grads, of_formula = (torch.autograd.grad((o * direction).sum(), (q, k, v)) for o in (out, expected))
    torch.testing.assert_close(grads, of_formula)


@pytest.mark.usefixtures("_torchs_kernel")
def test_span_kernels_gradcheck(monkeypatch):
    monkeypatch.setattr(span_kernels, "SHORTEST", 8)
    spans, rule = from_lengths([9, 3, 4, 10], None, (-1, 0, 0, -1)), Rule(0.7, None, None)
    inputs = _inputs(26, 4, 2, 4, 4, False)[:3]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_spans(q, k, v, None, spans, rule), inputs)


@pytest.mark.usefixtures("_torchs_kernel")
@pytest.mark.parametrize(
    ("rule", "sinks", "e"),
    [
        (Rule(0.7, 20, None), False, 8),
        (Rule(0.7, None, 1.5), False, 8),
        (Rule(0.7, None, None), True, 8),
        (Rule(0.7, None, None), False, 4),
    ],
    ids=["window", "softcap", "sinks", "values-of-another-size"],
)
def test_what_torchs_kernel_does_not_know_is_left_to_strips(rule, sinks, e):
    spans = from_lengths([130, 3], rule.window)
    q, k, v, s = _inputs(133, 4, 2, 8, e, sinks)
    assert span_kernels.by_torch(spans, q, k, v, s, rule) == ()


def test_the_machine_is_asked_which_kernel_is_faster(monkeypatch):
    """Once for each doubling of the length, without a draw from the run's own random numbers."""
    asked = []
    monkeypatch.setattr(span_kernels, "figure", lambda what, measure: asked.append((what, measure())) or asked[-1][1])
    q, k, v, _ = _inputs(1490, 4, 2, 8, 8, False, torch.float32)
    before = torch.get_rng_state()
    found = span_kernels.by_torch(from_lengths([800, 90, 600], None), q, k, v, None, Rule(0.7, None, None))
    assert torch.equal(torch.get_rng_state(), before)
    assert [what.split(", ")[1:] for what, _ in asked] == [
        ["torch.float32", "2 x 2 heads of 8", f"{length} tokens"] for length in (1024, 512)
    ]
    measured = (0, asked[0][1]), (2, asked[1][1])
    assert found == tuple(n for n, ratio in measured if ratio <= span_kernels.WORTH)
