"""Paged generation: the same answers as `generate` one prompt at a time, adapters included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
import transformers
import zoo
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from lowrank.attention import paged, paged_cache, set_attention
from lowrank.attention.paged import PAGED, generate_paged, paged_is_faster
from lowrank.attention.paged_cache import PAGE, cache_for, pages_that_fit
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
    sizes = cache_for([len(prompt) for prompt in PROMPTS], 9, len(PROMPTS))
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


LENGTHS = [10, 600, 300] + [5] * 40  # with 100 new tokens 1, 3, 2 pages, and 1 each


def test_the_cache_has_room_for_the_longest():
    assert cache_for(LENGTHS, 100, 43).num_blocks == 3 + 2 + 14 + 1
    assert cache_for(LENGTHS, 100, 4).num_blocks == 3 + 2 + 2 + 1


def test_on_a_card_it_has_room_for_the_prompts_of_a_batch_and_no_more():
    sizes = cache_for(LENGTHS, 100, 8, fitting=10_000)
    assert sizes.num_blocks == 3 + 2 + 6 + 1
    assert sizes.max_batch_tokens == 600 + 300 + 10 + 5 * 5
    assert sizes.max_requests_per_batch == 8
    assert cache_for(LENGTHS, 100, 43, fitting=10_000).num_blocks == 3 + 2 + 41 + 1
    assert cache_for([600] * 43, 100, 43, fitting=10_000).max_batch_tokens == 8192
    assert cache_for(LENGTHS, 100, 8, fitting=7).num_blocks == 7
    with pytest.raises(JobError, match=r"600 tokens and an answer of 100 take 4 pages .* room for 3"):
        cache_for(LENGTHS, 100, 8, fitting=3)


def test_how_many_pages_fit(monkeypatch):
    """A tiny Llama keeps 2 layers of keys and values of 2 heads of 8; one layer's are read, repeated to 4 heads."""
    model, real = tiny.tiny_llama(), setting_of(tiny.tiny_llama(), packing=False)
    assert pages_that_fit(model) is None
    on_card = replace(real, device=torch.device("cuda"))
    monkeypatch.setattr(paged_cache, "setting_of", lambda model, packing: on_card)
    for name, value in {
        "mem_get_info": (60 << 20, 80 << 20),
        "memory_reserved": 30 << 20,
        "memory_allocated": 10 << 20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    a_token = (2 * 2 * 2 + 2 * 4 + 2) * 8 * 4
    assert pages_that_fit(model) == int(0.8 * (80 << 20)) // (PAGE * a_token)


@pytest.mark.parametrize("room", ["all", "two of six"])
@pytest.mark.parametrize("name", ["llama", "mistral-window-16", "cohere2", "qwen3_moe", "gpt_oss"])
def test_a_cards_cache_answers_the_same_and_is_as_large_as_asked(name, room, monkeypatch):
    """What a card would be given, on the CPU: transformers takes memory for the pages, and prompts wait for them."""
    model, taken = zoo.adapted(name), []
    set_attention(model, "segments")
    expected = zoo.one_by_one(model, PROMPTS, GREEDY)
    monkeypatch.setattr(paged, "pages_that_fit", lambda model: 10_000)
    made = PagedAttentionCache.__init__

    def spied(self, *args, **kwargs):
        made(self, *args, **kwargs)
        taken.append((self.cache_tensor.nbytes, self.bytes_per_sector))

    monkeypatch.setattr(PagedAttentionCache, "__init__", spied)
    at_once = None if room == "all" else 2
    assert generate_paged(model, PROMPTS, GREEDY, at_once) == expected
    config = model.config
    head_dim = setting_of(model, packing=False).head_dim
    page = PAGE * 2 * config.num_key_value_heads * head_dim * 4 * config.num_hidden_layers
    ((found, sector),) = taken
    assert found <= ((at_once or len(PROMPTS)) + 1) * page + 3 * sector  # rounded up, and two that nothing is kept in
