"""Answers: sharing a beginning and sharing a batch change none of them."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import lowrank
from lowrank.attention import set_attention
from lowrank.training.evaluation import answers
from lowrank.training.evaluation.answers import answer_all, greedy
from lowrank.training.evaluation.begun import Begun
from lowrank.training.evaluation.greedy import (
    RoomyLayer,
    can_continue_rows,
    can_share,
    contiguous_head,
    continue_rows,
)

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


def adapted(model):
    """Adapters whose both factors are random."""
    lowrank.wrap(model, lowrank.LoraConfig(r=4, init_lora_weights="gaussian"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def bloom():
    return tiny.build(transformers.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4))


def mamba():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return tiny.build(transformers.MambaConfig(vocab_size=tiny.VOCAB, pad_token_id=0, eos_token_id=2, **sizes))


MODELS = {name: getattr(tiny, f"tiny_{name}") for name in ("llama", "gpt2", "qwen2", "mistral", "gemma2")}


@pytest.mark.parametrize("beginning", [BEGINNING, []], ids=["shared", "apart"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
@pytest.mark.parametrize("name", MODELS)
def test_all_at_once_as_one_by_one(name, backend, beginning):
    if (name, backend) == ("gemma2", "sdpa"):
        pytest.skip("sdpa has no soft cap, and refuses")
    model = adapted(MODELS[name]())
    assert can_continue_rows(model)
    _equal_one_by_one(model, prompts_of(9, beginning), backend)


@pytest.mark.parametrize("build", [bloom, mamba])
def test_what_needs_more_in_a_step_goes_through_generate(build):
    model = adapted(build())
    assert not can_continue_rows(model)
    _equal_one_by_one(model, prompts_of(9, BEGINNING), "auto")


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_paged_where_it_is_the_faster_way(name, monkeypatch):
    monkeypatch.setattr(answers, "paged_is_faster", lambda model: True)
    model = adapted(MODELS[name]())
    prompts, told = prompts_of(9, BEGINNING), []
    expected = one_by_one(model, tiny.tiny_tokenizer(), prompts)
    found = answer_all(model, tiny.tiny_tokenizer(), prompts, max_new_tokens=12, batch_size=4, on_batch=told.append)
    assert found == expected
    assert told == [9]


def _equal_one_by_one(model, prompts, backend) -> None:
    """Some answers end early, so that rows leave their batch: the end is a token that the model likes to say."""
    tokenizer = tiny.tiny_tokenizer()
    likes = one_by_one(model, tokenizer, prompts)
    model.generation_config.eos_token_id = tokenizer(likes[0] + likes[1])["input_ids"][5]
    expected = one_by_one(model, tokenizer, prompts)
    set_attention(model, backend)
    told = []
    found = answer_all(model, tokenizer, prompts, max_new_tokens=12, batch_size=4, on_batch=told.append)
    assert found == expected
    assert told == [4, 4, 1]
    assert len(set(map(len, found))) > 1, "all answers end alike: this tests little"
    assert model.generation_config.eos_token_id is not None


def test_rows_that_are_done_leave_the_batch(monkeypatch):
    """Each pass holds no more rows than still write."""
    model, rows = MODELS["llama"](), []
    prompts = prompts_of(6, [])
    generation = transformers.GenerationConfig(max_new_tokens=12, eos_token_id=[2], pad_token_id=0, do_sample=False)
    tokens = continue_rows(model, prompts, generation)
    generation.eos_token_id = [tokens[0][3], tokens[1][6]]
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    with torch.no_grad():
        ended = continue_rows(model, prompts, generation)
    lengths = [len(row) + (len(row) < 12) for row in ended]
    assert rows == [sum(length > at for length in lengths) for at in range(max(lengths))]
    assert rows[-1] < rows[0]


def test_roomy_layers_hold_what_transformers_own_hold():
    ours, theirs = RoomyLayer(9), transformers.cache_utils.DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for tokens, kept in ((4, [3, 1, 2]), (1, [0, 2]), (3, [1]), (1, [0])):
        rows = 4 if theirs.get_seq_length() == 0 else len(theirs.keys)
        states = [torch.randn(rows, 2, tokens, 8, generator=generator) for _ in range(2)]
        for found, expected in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(found, expected)
        moved = torch.tensor([[place, row] for place, row in enumerate(kept) if place != row], dtype=torch.int64)
        ours.keep(len(kept), *moved.view(-1, 2).T)
        theirs.batch_select_indices(torch.tensor(kept))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    with pytest.raises(ValueError, match="room for 9 tokens, not for 10"):
        ours.update(*(torch.randn(1, 2, 1, 8) for _ in range(2)))


def test_the_head_is_given_contiguous_states():
    """Else torch copies the head's matrix for every row of a batch."""
    model = MODELS["llama"]()
    given = []
    ids = torch.randint(3, 300, (3, 5))
    model.lm_head.forward = lambda states: given.append(states.is_contiguous()) or states
    with contiguous_head(model):
        model(input_ids=ids, logits_to_keep=1)
    model(input_ids=ids, logits_to_keep=1)
    assert given == [True, False]


def begun_of(model, prompts) -> list[int]:
    """How many tokens each prompt begins with that have gone through the model before it."""
    begun = Begun(model, prompts, share=True)
    assert sorted(begun.order) == list(range(len(prompts)))
    caches = {at: begun.of(at) for at in begun.order}
    return [0 if caches[at] is None else caches[at].get_seq_length() for at in range(len(prompts))]


def test_what_is_shared():
    model, other = MODELS["llama"](), [token + 1 for token in BEGINNING]
    assert begun_of(model, [[*BEGINNING, 5], [*BEGINNING, 6, 7], [*BEGINNING, 6]]) == [len(BEGINNING)] * 3
    assert begun_of(model, [BEGINNING, BEGINNING]) == [len(BEGINNING) - 1] * 2  # something is left to each
    assert begun_of(model, [BEGINNING]) == [0]
    assert begun_of(model, [BEGINNING[:5], BEGINNING[:6]]) == [0, 0]
    assert begun_of(model, [BEGINNING, [1, *BEGINNING]]) == [0, 0]
    apart = [[*BEGINNING, 5], [*other, 5], [7, 8], [*BEGINNING, 6], [*other, 6]]
    assert begun_of(model, apart) == [len(BEGINNING), len(other), 0, len(BEGINNING), len(other)]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
def test_prompts_of_several_beginnings_are_answered_as_one_by_one(backend):
    """Two documents with questions, one of them with a beginning of its own inside, and prompts that share nothing."""
    model, tokenizer = adapted(MODELS["qwen2"]()), tiny.tiny_tokenizer()
    rng = torch.Generator().manual_seed(4)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, tiny.VOCAB, (count,), generator=rng).tolist()

    documents = [tokens(30), tokens(21)]
    documents.append([*documents[0], *tokens(18)])
    prompts = [[*document, *tokens(n)] for document in documents for n in (3, 1, 7)] + [tokens(9), tokens(25)]
    prompts = prompts[::2] + prompts[1::2]
    expected = one_by_one(model, tokenizer, prompts)
    set_attention(model, backend)
    passed = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert answer_all(model, tokenizer, prompts, max_new_tokens=12, batch_size=4) == expected
    assert len(set(expected)) > 3
    assert sum(passed) < sum(map(len, prompts)) - 100 + 12 * len(prompts)


def test_a_sliding_window_counts_padding_and_does_not_share():
    assert can_share(tiny.tiny_llama())
    assert not can_share(tiny.tiny_mistral())
    assert not can_share(tiny.tiny_gemma2())
