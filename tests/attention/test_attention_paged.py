"""Paged generation: the same answers as `generate` one prompt at a time, adapters included."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
import zoo

from lowrank.attention import set_attention
from lowrank.attention.paged import PAGED, cache_for, generate_paged, paged_is_faster
from lowrank.attention.setting import setting_of
from lowrank.errors import InputError, JobError

PROMPTS = [row[0].tolist() for row in zoo.examples((12, 5, 1, 30, 7, 19))]
GREEDY = transformers.GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_equals_generate_and_gives_the_attention_back(name):
    model = zoo.adapted(name)
    refusal = PAGED.refusal(setting_of(model, packing=False))
    if refusal is not None:
        with pytest.raises(InputError, match="`paged` cannot serve"):
            generate_paged(model, PROMPTS, GREEDY)
        pytest.skip(f"paged refuses: {refusal}")
    set_attention(model, "segments")
    expected = zoo.one_by_one(model, PROMPTS, GREEDY)
    assert generate_paged(model, PROMPTS, GREEDY) == expected
    assert model.config._attn_implementation == "lowrank_segments"
    assert any(answer != expected[0] for answer in expected), "all answers are one: this tests little"


def test_the_model_can_be_set_to_it():
    model = zoo.build("llama")
    expected = zoo.one_by_one(model, PROMPTS, GREEDY)
    set_attention(model, "paged")
    sizes = cache_for([len(prompt) for prompt in PROMPTS], 9, torch.device("cpu"))
    outputs = model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=sizes)
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_who_asks_for_it_by_name_gets_it():
    model = zoo.build("llama")
    assert not paged_is_faster(model)
    assert "answers many prompts at once; in training it is `sdpa`" in set_attention(model, "paged").why
    assert paged_is_faster(model)
    set_attention(model, "auto")
    assert not paged_is_faster(model)


def test_with_sinks_it_is_refused_for_training():
    with pytest.raises(InputError, match="with attention sinks it generates only"):
        set_attention(zoo.build("gpt_oss"), "paged", packing=True)


def test_refusals():
    with pytest.raises(InputError, match="`paged` cannot serve Gemma2ForCausalLM: it cannot soft-cap"):
        generate_paged(tiny.tiny_gemma2(), PROMPTS, GREEDY)
    with pytest.raises(InputError, match="max_new_tokens"):
        generate_paged(tiny.tiny_llama(), PROMPTS, transformers.GenerationConfig())


def test_what_transformers_only_logs_is_an_error(monkeypatch):
    model = tiny.tiny_llama()
    monkeypatch.setattr(model, "generate_batch", lambda *args, **kwargs: {})
    with pytest.raises(JobError, match="answered 0 of 6 prompts"):
        generate_paged(model, PROMPTS, GREEDY)
    assert model.config._attn_implementation == "sdpa"


def test_the_cache_has_room_for_the_longest():
    config = cache_for([10, 600, 300] + [5] * 40, 100, torch.device("cpu"))
    assert config.num_blocks == 3 + 2 + 14 + 1
