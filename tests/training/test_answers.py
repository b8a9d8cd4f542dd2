"""Answers: sharing a beginning and sharing a batch change none of them."""

from __future__ import annotations

import pytest
import tiny
import torch

import lowrank
from lowrank.attention import set_attention
from lowrank.training.answers import answer_all, can_share, greedy, shared_length

BEGINNING = list(range(20, 60))


def prompts_of(count: int, beginning: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [beginning + torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, tokenizer, prompts) -> list[str]:
    answers = []
    for prompt in prompts:
        with greedy(model, tokenizer, 12) as config, torch.no_grad():
            output = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)
        tokens = output[0, len(prompt) :].tolist()
        ended = next((at for at, token in enumerate(tokens) if token in config.eos_token_id), len(tokens))
        answers.append(tokenizer.decode(tokens[:ended], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("beginning", [BEGINNING, []], ids=["shared", "apart"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mistral", "gemma2"])
def test_all_at_once_as_one_by_one(name, backend, beginning):
    if (name, backend) == ("gemma2", "sdpa"):
        pytest.skip("sdpa has no soft cap, and refuses")
    model = getattr(tiny, f"tiny_{name}")()
    lowrank.wrap(model, lowrank.LoraConfig(r=4, init_lora_weights="gaussian"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    tokenizer = tiny.tiny_tokenizer()
    prompts = prompts_of(9, beginning)
    expected = one_by_one(model, tokenizer, prompts)
    set_attention(model, backend)
    told = []
    found = answer_all(model, tokenizer, prompts, max_new_tokens=12, batch_size=4, on_batch=told.append)
    assert found == expected
    assert told == [4, 4, 1]
    assert len(set(found)) > 1


def test_what_is_shared():
    assert shared_length(prompts_of(9, BEGINNING)) >= len(BEGINNING)
    assert shared_length([BEGINNING, BEGINNING]) == len(BEGINNING) - 1  # something is left to each
    assert shared_length([BEGINNING]) == 0
    assert shared_length([BEGINNING[:5], BEGINNING[:6]]) == 0
    assert shared_length([BEGINNING, [1, *BEGINNING]]) == 0


def test_a_sliding_window_counts_padding_and_does_not_share():
    assert can_share(tiny.tiny_llama())
    assert not can_share(tiny.tiny_mistral())
    assert not can_share(tiny.tiny_gemma2())
