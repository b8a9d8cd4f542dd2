"""The kernel of rotary positions against transformers' functions, bit for bit where the interpreter can be."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import in_dtypes, numbers, on_devices
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partly
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as wholly

from lowrank.ops.kernels.rotation import rotated


def operands(batch, heads, fewer, tokens, d, r, dtype=torch.float32, device="cpu", rows=1):
    """Queries and keys as projections leave them: heads beside one another, tokens apart."""
    q = numbers(batch, tokens, heads, d, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
    k = numbers(batch, tokens, fewer, d, dtype=dtype, device=device, seed=1).transpose(1, 2).requires_grad_()
    cos, sin = (numbers(rows, tokens, r, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    return q, k, cos, sin


def with_gradients(found, q, k):
    directions = [numbers(*x.shape, dtype=x.dtype, device=str(x.device), seed=4) for x in found]
    return [*found, *torch.autograd.grad(found, (q, k), directions)]


@on_devices
@in_dtypes
@pytest.mark.parametrize(
    ("batch", "heads", "fewer", "tokens", "d", "r", "rows"),
    [(1, 9, 3, 33, 64, 64, 1), (2, 4, 2, 7, 80, 32, 1), (2, 1, 1, 1, 2, 2, 2), (3, 5, 5, 9, 100, 100, 3)],
)
def test_is_transformers_function(batch, heads, fewer, tokens, d, r, rows, dtype, device):
    q, k, cos, sin = operands(batch, heads, fewer, tokens, d, r, dtype, device, rows)
    mine = with_gradients(rotated(q, k, cos, sin, dtype, dtype), q, k)
    theirs = with_gradients((wholly if d == r else partly)(q, k, cos, sin), q, k)
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype
        if dtype == torch.bfloat16 and device == "cpu":  # where products and sum are rounded towards zero
            bound = 3 * 2.0**-7 * (1 + expected.abs().amax())
            assert bool(((got - expected).abs() <= bound).all())
        else:
            assert torch.equal(got, expected)


@on_devices
def test_the_backward_pass_is_the_opposite_rotation(device):
    q, k, _, _ = operands(2, 3, 2, 7, 16, 16, device=device)
    angles = numbers(1, 7, 8, device=device, seed=2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    _, _, d_q, d_k = with_gradients(rotated(q, k, cos, sin, torch.float32, torch.float32), q, k)
    directions = [numbers(*x.shape, device=device, seed=4) for x in (q, k)]
    back = rotated(*directions, cos, -sin, torch.float32, torch.float32)
    assert torch.equal(d_q, back[0])
    assert torch.equal(d_k, back[1])
    there = rotated(*back, cos, sin, torch.float32, torch.float32)
    torch.testing.assert_close(there, tuple(directions), rtol=1e-5, atol=1e-5)


@on_devices
def test_slices_of_one_projection_and_other_strides(device):
    fused = numbers(2, 7, 5 * 16, device=device)
    q, k, _ = (x.view(2, 7, -1, 16).transpose(1, 2) for x in fused.split([48, 16, 16], -1))
    _, _, cos, sin = operands(2, 3, 1, 7, 16, 16, device=device)
    apart = torch.stack((cos, cos), -1)[..., 0]
    for queries, keys in (
        (q, k),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k),
        (q[:, ::2], k.expand(2, 4, 7, 16)),
    ):
        expected = wholly(queries, keys, cos, sin)
        got = rotated(queries, keys, apart, sin, torch.float32, torch.float32)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@on_devices
def test_angles_of_more_digits(device):
    """As when queries come out of products in a shorter dtype."""
    q, k, _, _ = operands(1, 2, 1, 5, 16, 16, torch.float16, device)
    _, _, cos, sin = operands(1, 2, 1, 5, 16, 16, torch.float32, device)
    mine = with_gradients(rotated(q, k, cos, sin, torch.float32, torch.float32), q, k)
    theirs = with_gradients(wholly(q, k, cos, sin), q, k)
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@on_devices
def test_nothing_is_rotated(device):
    q, k, cos, sin = operands(1, 2, 1, 0, 16, 16, device=device)
    found = rotated(q, k, cos, sin, torch.float32, torch.float32)
    torch.cat(found, 1).sum().backward()
    assert found[0].shape == q.shape
    assert found[1].shape == k.shape


@on_devices
def test_keeps_the_angles_alone(device):
    q, k, cos, sin = operands(1, 2, 1, 5, 16, 16, device=device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s.data_ptr()) or s, lambda s: s):
        rotated(q, k, cos, sin, torch.float32, torch.float32)
    assert saved == [cos.data_ptr(), sin.data_ptr()]
