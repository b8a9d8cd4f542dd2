"""The backends end to end on a CUDA card, by the same oracle as on CPU: eager in float32 on separate sequences."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
import zoo

from lowrank.attention import BACKENDS, check_packing, set_attention
from lowrank.attention.paged import generate_paged
from lowrank.attention.setting import setting_of

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = {
    "single": zoo.apart,
    "pack": zoo.packed,
    "left": functools.partial(zoo.padded, side="left"),
    "right": functools.partial(zoo.padded, side="right"),
}
# FlexAttention compiles minutes for every model: these have heads as wide as its kernels need.
FLEX = ("qwen3", "qwen3_moe")


@functools.cache
def _on_card(name: str, dtype: torch.dtype):
    return zoo.adapted(name, torch.bfloat16).to("cuda", dtype)


@functools.cache
def _reference(name: str) -> zoo.Result:
    model = _on_card(name, torch.float32)
    set_attention(model, "eager")
    return zoo.apart(model, zoo.examples())


@functools.cache
def _rounding(name: str) -> float:
    model = _on_card(name, torch.bfloat16)
    set_attention(model, "eager")
    return max(zoo.difference(zoo.apart(model, zoo.examples()), _reference(name)).values())


def _set_or_skip(model, name: str, backend: str) -> None:
    refusal = BACKENDS[backend].refusal(setting_of(model, packing=True))
    if refusal is not None:
        pytest.skip(f"{backend} refuses: {refusal}")
    if backend == "flex" and name not in FLEX:
        pytest.skip("flex compiles for minutes; run for some models only")
    if (name, backend) in {("opt", "sdpa")}:
        pytest.skip("its masks take no notice of packs, and are refused by the self-test")
    set_attention(model, backend, packing=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "segments", "flash", "flex"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_bfloat16(name, backend, case):
    allowed = max(2e-2, 1.5 * _rounding(name))
    model = _on_card(name, torch.bfloat16)
    _set_or_skip(model, name, backend)
    errors = zoo.difference(CASES[case](model, zoo.examples()), _reference(name))
    assert max(errors.values()) < allowed, {k: v for k, v in errors.items() if v >= allowed}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "segments"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_float32(name, backend, case):
    model = _on_card(name, torch.float32)
    _set_or_skip(model, name, backend)
    errors = zoo.difference(CASES[case](model, zoo.examples()), _reference(name))
    assert max(errors.values()) < 1e-5, {k: v for k, v in errors.items() if v >= 1e-5}


@pytest.mark.parametrize("backend", ["sdpa", "segments"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_generate_after_a_swap(name, backend):
    model = _on_card(name, torch.float32)
    rows = zoo.pad([row for row in zoo.examples() if row.shape[1] > 10], "left")
    ids, mask = (x.to("cuda") for x in rows)

    def generated(**how) -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **how)

    set_attention(model, "eager")
    expected = generated(use_cache=False)
    _set_or_skip(model, name, backend)
    assert torch.equal(generated(use_cache=True), expected)
    assert torch.equal(generated(use_cache=False), expected)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_paged_equals_generate(name):
    model = _on_card(name, torch.float32)
    refusal = BACKENDS["paged"].refusal(setting_of(model, packing=False))
    if refusal is not None:
        pytest.skip(f"paged refuses: {refusal}")
    prompts = [row[0].tolist() for row in zoo.examples((12, 5, 1, 30, 7, 19))]
    greedy = transformers.GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=2, pad_token_id=0)
    set_attention(model, "auto")
    expected = zoo.one_by_one(model, prompts, greedy)
    assert generate_paged(model, prompts, greedy) == expected


@pytest.mark.parametrize("name", zoo.ZOO)
def test_auto_passes_the_self_test(name):
    model = _on_card(name, torch.bfloat16)
    set_attention(model, "auto", packing=True)
    check_packing(model)


def test_gradient_checkpointing_recomputes_on_autograd_s_thread():
    model = _on_card("llama", torch.bfloat16)
    set_attention(model, "segments", packing=True)
    expected = zoo.packed(model, zoo.examples())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    result = zoo.packed(model, zoo.examples())
    model.gradient_checkpointing_disable()
    model.eval()
    assert max(zoo.difference(result, expected).values()) < 1e-6
