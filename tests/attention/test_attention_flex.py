"""FlexAttention: our wrapper's refusals, and its masks (segments, padding, windows, prefixes) on CPU without compiling."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
import zoo
from transformers import masking_utils

from lowrank.attention import check_packing, check_sharing, positions_of, segments, set_attention
from lowrank.attention.flex import FLEX, flex_attention
from lowrank.attention.setting import setting_of
from lowrank.errors import InputError


@pytest.fixture
def uncompiled(monkeypatch):
    """The same functions, computed without a compiler: seconds instead of minutes."""
    block_mask = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, _compile, **k: block_mask(*a, **k))
    with torch.compiler.set_stance("force_eager"):
        yield


def _packed_and_padded_like_eager(name: str) -> None:
    model, rows = zoo.build(name), zoo.examples()
    set_attention(model, "eager")
    with torch.no_grad():
        expected = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])
        set_attention(model, "flex")
        lengths = [row.shape[1] for row in rows]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        with segments(model, lengths):
            packed = model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits[0]
        ids, mask = zoo.pad(rows, "left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    for result in (packed, padded):
        assert (result - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", zoo.ZOO)
def test_packs_and_padding(name):
    refusal = FLEX.refusal(setting_of(zoo.build(name), packing=False))
    if refusal is not None:
        with pytest.raises(InputError, match="`flex` cannot serve"):
            set_attention(zoo.build(name), "flex")
        pytest.skip(f"flex refuses: {refusal}")
    if name == "opt":  # counts its own positions, and flex is told no segments
        model = zoo.build(name).requires_grad_(False)
        set_attention(model, "flex")
        with pytest.raises(InputError, match="cannot train on packs"):
            check_packing(model)
        return
    _packed_and_padded_like_eager(name)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["llama", "mistral-window-16", "gemma2"])
def test_forests(name):
    """Block masks of segments with parents; windows are counted along the paths."""
    model = zoo.build(name).requires_grad_(False)
    set_attention(model, "flex")
    check_sharing(model)
    parts = zoo.examples(zoo.TREE)
    positions = torch.tensor([positions_of(zoo.TREE, zoo.PARENTS)])
    with segments(model, zoo.TREE, zoo.PARENTS):
        logits = model(input_ids=torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
    for path in zoo.paths(zoo.PARENTS):
        found = torch.cat([logits.split(zoo.TREE, dim=1)[number] for number in path], dim=1)
        alone = model(input_ids=torch.cat([parts[number] for number in path], dim=1), use_cache=False).logits
        assert (found - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.slow
def test_compiled():
    _packed_and_padded_like_eager("mistral-window-16")


@pytest.mark.usefixtures("uncompiled")
def test_prefix():
    """A prefix that sees itself both ways, as some models' mask functions say it."""
    prefix = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q < 4) & (k < 4))
    mask = masking_utils.flex_attention_mask(1, 9, 9, mask_function=prefix)
    torch.manual_seed(0)
    module = types.SimpleNamespace(is_causal=True, training=False)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    out, _ = flex_attention(module, q, k, v, mask, scaling=0.3)
    square = masking_utils.sdpa_mask(1, 9, 9, mask_function=prefix, allow_is_causal_skip=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, square, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.usefixtures("uncompiled")
def test_gradients_on_cpu_are_refused():
    model = zoo.adapted("llama")
    set_attention(model, "flex")
    with pytest.raises(InputError, match="`flex` cannot serve LlamaAttention: it has no backward pass on CPU"):
        model(input_ids=zoo.examples((9,))[0], use_cache=False)


def test_dropout_and_a_missing_mask_are_refused():
    q = torch.randn(1, 2, 5, 8)
    module = types.SimpleNamespace(is_causal=True)
    with pytest.raises(InputError, match="no dropout"):
        flex_attention(module, q, q, q, None, dropout=0.1)
    with pytest.raises(InputError, match="gave a causal layer no mask"):
        flex_attention(module, q, q, q, None)


def test_heads_that_its_kernels_on_a_card_do_not_take_are_refused():
    setting = setting_of(zoo.build("llama"), packing=True)
    on_card = dataclasses.replace(setting, device=torch.device("cuda"))
    assert on_card.head_dim == 8
    assert "heads of 16 and wider, the model's are 8 wide" in FLEX.refusal(on_card)
    assert FLEX.refusal(dataclasses.replace(on_card, head_dim=64)) is None
