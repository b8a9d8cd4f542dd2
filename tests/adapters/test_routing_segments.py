"""One adapter for each segment of a pack: each segment is what its adapter gives alone, gradients too, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from architectures import LLAMA_LIKE
from architectures import MODELS as ARCHITECTURES
from tiny import VOCAB

import lowrank
from lowrank import AdaLoraConfig, LoraConfig, MissConfig, VeraConfig
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank
from lowrank.ops.routed_linear import Part, routed_linear, routed_linear_reference
from lowrank.training.evaluation.greedy import continue_rows
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.norms import lean_norms

NAMES, LENGTHS = ["a", None, "b", "a", "b"], [5, 3, 7, 4, 2]
PAIRS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(r=4), LoraConfig(r=2, lora_alpha=64)),
    "rslora, dora": (LoraConfig(r=4, use_rslora=True), LoraConfig(r=8, use_dora=True)),
    "two doras": (LoraConfig(r=4, use_dora=True), LoraConfig(r=2, use_dora=True)),
    "miss, vera": (MissConfig(r=4), VeraConfig(r=8)),
    "adalora, other targets": (
        AdaLoraConfig(init_r=4, target_r=2, total_step=10),
        LoraConfig(r=3, target_modules=r".*layers\.0\..*_proj"),
    ),
    "biases": (LoraConfig(r=4, bias="all"), LoraConfig(r=2, bias="lora_only")),
    "whole head": (LoraConfig(r=4, modules_to_save=["lm_head"]), LoraConfig(r=2)),
    "tokens": (LoraConfig(r=4, trainable_token_indices=[5, 9]), LoraConfig(r=2)),
}


def wrapped(model: Any, pair: tuple[Any, Any]) -> Any:
    torch.manual_seed(0)
    for name, config in zip("ab", pair, strict=True):
        lowrank.wrap(model, config, name)
    for key, parameter in model.named_parameters():
        if ".adapters." in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    lowrank.set_attention(model, "auto", packing=True)
    return model.eval()


def pack(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "position_ids": places}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and ".adapters." in name
    }
    model.zero_grad()
    return found


def alone(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each segment by itself under its adapter: logits, and the gradients of the sum of their squares."""
    logits, place = [], 0
    for name, length in zip(NAMES, LENGTHS, strict=True):
        ids = inputs["input_ids"][:, place : place + length]
        with lowrank.disabled(model) if name is None else lowrank.using(model, name):
            logits.append(model(ids, use_cache=False).logits)
            if name is not None:
                logits[-1].square().mean().backward()
        place += length
    return torch.cat(logits, 1).detach(), gradients(model)


def together(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with lowrank.segments(model, LENGTHS), lowrank.routed(model, NAMES, LENGTHS):
        logits = model(**inputs, use_cache=False).logits
        parts = zip(logits.split(LENGTHS, 1), NAMES, strict=True)
        sum(part.square().mean() for part, name in parts if name is not None).backward()
    return logits.detach(), gradients(model)


def check_equal(model: Any) -> None:
    inputs = pack(LENGTHS)
    expected, wanted = alone(model, inputs)
    logits, found = together(model, inputs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_segments_are_what_each_adapter_gives_alone(name, pair):
    if name == "gpt2" and ("layers" in str(pair[1].target_modules) or isinstance(pair[0], MissConfig)):
        pytest.skip("its layers have another name, and MiSS fits no Conv1D")
    check_equal(wrapped(ARCHITECTURES[name](), pair))


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "olmo2", "gpt_neox"]
)
def test_segments_in_other_architectures(name):
    check_equal(wrapped(ARCHITECTURES[name](), PAIRS["rslora, dora"]))


@pytest.mark.parametrize("how", ["keep less", "recompute"])
def test_segments_in_a_model_made_ready_for_training(how):
    model = wrapped(ARCHITECTURES["llama"](), PAIRS["rslora, dora"])
    if how == "keep less":
        lean_norms(model)
        keep_less(model)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    check_equal(model)


def test_embeddings_and_experts():
    check_equal(
        wrapped(ARCHITECTURES["llama"](), (LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), LoraConfig()))
    )
    moe = ARCHITECTURES["qwen3_moe"]()
    lowrank.wrap(moe, LoraConfig(target_parameters=["gate_up_proj"]), "a")
    with (
        pytest.raises(InputError, match="an expert, where tokens of all rows mix"),
        lowrank.routed(moe, ["a", None], [3, 4]),
    ):
        pass


def test_segments_that_go_on_from_others():
    model = wrapped(ARCHITECTURES["llama"](), PAIRS["lora"])
    lengths, parents, names = [4, 3, 2, 5, 3], [-1, 0, 0, -1, 3], ["a", "a", "a", "b", "b"]
    inputs = pack(lengths)
    starts = torch.tensor([0, 4, 4, 0, 5])
    inputs["position_ids"] = torch.cat([s + torch.arange(n) for s, n in zip(starts, lengths, strict=True)])[None]
    with lowrank.segments(model, lengths, parents), lowrank.routed(model, names, lengths):
        pieces = model(**inputs, use_cache=False).logits.split(lengths, 1)
    ids = inputs["input_ids"].split(lengths, 1)
    for child in (1, 2, 4):
        with lowrank.using(model, names[child]):
            whole = model(torch.cat([ids[parents[child]], ids[child]], 1), use_cache=False).logits
        torch.testing.assert_close(pieces[child], whole[:, -lengths[child] :], atol=2e-5, rtol=1e-5)
    with (
        lowrank.segments(model, lengths, parents),
        lowrank.routed(model, ["a", "b", "a", "b", "b"], lengths),
        pytest.raises(InputError, match=r"segment 1 of the pack has the adapter 'b' and goes on from segment 0"),
    ):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize(
    ("names", "lengths", "message"),
    [
        (["a", "b"], [5], "2 names and the lengths of 1 segments"),
        (["a", "x"], [5, 5], "no adapter 'x'"),
        (["a", "b"], [5, 17], "segments of 22 tokens, and a Linear sees"),
        (["a", "b"], [-1, 22], "a segment of -1 tokens"),
        (["a", "b"], [6, 15], "segment 1 of the pack, its tokens 5 to 7, is not within"),
    ],
)
def test_what_does_not_fit_the_pack_is_refused(names, lengths, message):
    model = wrapped(ARCHITECTURES["llama"](), PAIRS["lora"])
    announced = lowrank.segments(model, LENGTHS if sum(lengths) == sum(LENGTHS) else None)
    with pytest.raises(InputError, match=message), announced, lowrank.routed(model, names, lengths):
        model(**pack(LENGTHS), use_cache=False)


def test_convolutions_are_refused():
    vision = t.ViTModel(
        t.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    lowrank.wrap(vision, LoraConfig(r=2, target_modules=["projection"]), "a")
    with (
        pytest.raises(InputError, match="a convolution, in which neighbouring tokens mix"),
        lowrank.routed(vision, ["a"], [4]),
    ):
        pass


def test_dropout_draws_what_each_adapter_draws_alone():
    fields = {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False}
    model = wrapped(ARCHITECTURES["llama"](), (LoraConfig(**fields), LoraConfig(**fields, use_dora=True))).train()
    names, lengths = ["a", "b"], [6, 7]
    inputs = pack(lengths)
    with lowrank.routed(
        model, names, lengths, random={n: torch.Generator().manual_seed(i) for i, n in enumerate(names)}
    ):
        pieces = model(**inputs, use_cache=False).logits.split(lengths, 1)
    for seed, (name, ids) in enumerate(zip(names, inputs["input_ids"].split(lengths, 1), strict=True)):
        torch.manual_seed(seed)
        with lowrank.using(model, name):
            torch.testing.assert_close(pieces[seed], model(ids, use_cache=False).logits, atol=2e-5, rtol=1e-5)


def test_rows_that_leave_take_their_adapters_along():
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA_LIKE, initializer_range=0.3)).eval()
    wrapped(model, PAIRS["lora"])
    names = ["a", "b", None, "b", "a"]
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 6, 7], [8, 9]]
    probe = t.GenerationConfig(max_new_tokens=12, eos_token_id=[2], pad_token_id=0)

    def each(config):
        found = []
        for name, prompt in zip(names, prompts, strict=True):
            with lowrank.disabled(model) if name is None else lowrank.using(model, name):
                found.extend(continue_rows(model, [prompt], config))
        return found

    with torch.no_grad():
        ends = sorted(
            {answer[place] for answer, place in zip(each(probe), [2, 5, 8, 4, 7], strict=True) if len(answer) > place}
        )
        config = t.GenerationConfig(max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
        expected = each(config)
        assert len({len(answer) for answer in expected}) > 2, "rows are to leave one after another"
        with lowrank.routed(model, names):
            assert continue_rows(model, prompts, config) == expected


def test_the_function_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    x, W, b = torch.randn(9, 5, **double), torch.randn(4, 5, **double), torch.randn(4, **double)
    terms = [
        LowRank(torch.randn(r, 5, **double), torch.randn(4, r, **double), 0.7, gain)
        for r, gain in ((2, None), (3, torch.rand(4, **double)), (1, None))
    ]
    own = torch.randn(4, **double)
    given = [x, terms[0].A, terms[0].B, terms[1].A, terms[1].B, terms[1].gain, terms[2].A, terms[2].B, own]
    for tensor in given:
        tensor.requires_grad_(True)

    def run(of, x, A0, B0, A1, B1, gain, A2, B2, own):
        parts = [Part(slice(2, 5), LowRank(A0, B0, 0.7), b), Part(slice(5, 6), LowRank(A1, B1, 1.3, gain), b)]
        return of(x, W, b, [*parts, Part(slice(7, 9), LowRank(A2, B2, 2.0), own)])

    torch.testing.assert_close(run(routed_linear, *given), run(routed_linear_reference, *given))
    assert torch.autograd.gradcheck(lambda *tensors: run(routed_linear, *tensors), given)
