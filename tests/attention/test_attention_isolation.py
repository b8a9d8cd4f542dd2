"""The self-test of packs in deep mixtures of experts in 16 bits: rounding does not fail it, and a leak does.

Kernels round a token's products otherwise when others are multiplied with it. Those of this machine hardly do, so `rounding`
stands for it: of what attention and experts give, each number is one unit in the last place larger or smaller, as all
tokens of the call will have it.
"""

from __future__ import annotations

import zlib

import pytest
import tiny
import torch
import transformers
from torch import nn

from lowrank.attention import check_packing, check_sharing, isolation, set_attention
from lowrank.errors import InputError

EXPERTS = {"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "mixtral": lambda sizes: transformers.MixtralConfig(**sizes),
    "qwen3_moe": lambda sizes: transformers.Qwen3MoeConfig(**sizes, head_dim=16),
}
ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
CASES = [(name, dtype) for name in CONFIGS for dtype in ULP]


def deep(name: str, dtype: torch.dtype, layers: int = 24, seed: int = 0) -> transformers.PreTrainedModel:
    sizes = {**tiny._LLAMA_LIKE, **EXPERTS, "initializer_range": 0.15, "num_hidden_layers": layers}
    model = tiny.build(CONFIGS[name](sizes), seed=seed).to(dtype).requires_grad_(False)
    set_attention(model, "segments", packing=True)
    return model


def rounding(model: nn.Module) -> None:
    """What attention and experts give is rounded as the whole input of the call has it."""

    def after(module: nn.Module, args: tuple, kwargs: dict, out: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        first = out[0] if isinstance(out, tuple) else out
        generator = torch.Generator().manual_seed(zlib.crc32(given.detach().float().numpy().tobytes()))
        signs = torch.randint(-1, 2, first.shape, generator=generator).to(first.dtype)
        rounded = first + first.detach() * signs * ULP[first.dtype]
        return (rounded, *out[1:]) if isinstance(out, tuple) else rounded

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(after, with_kwargs=True)
        layer.mlp.register_forward_hook(after, with_kwargs=True)


def leaking(model: nn.Module, layer: int, share: float) -> None:
    """In one layer each token gets a little of the mean of the whole pack."""

    def before(module: nn.Module, args: tuple) -> tuple:
        return (args[0] + share * args[0].mean(dim=-2, keepdim=True), *args[1:])

    model.model.layers[layer].register_forward_pre_hook(before)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rounding_does_not_fail_it(name, dtype, seed):
    model = deep(name, dtype, seed=seed)
    rounding(model)
    check_packing(model)
    check_sharing(model)


def test_rounding_is_enough_to_change_everything():
    """The tests here test something: between a pack and a segment alone logits differ by more than one layer may."""
    model = deep("mixtral", torch.bfloat16)
    rounding(model)
    ids = isolation._ids(model, 12, 0)
    positions = torch.tensor([[*range(7), *range(5)]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 7:].float()
    alone = model(input_ids=ids[:, 7:], use_cache=False).logits.float()
    assert (packed - alone).norm() > isolation._APART_16_BITS * alone.norm()


@pytest.mark.parametrize(("layer", "share"), [(0, 0.02), (12, 1.0), (23, 0.02)])
@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3_moe", torch.bfloat16), ("mixtral", torch.bfloat16), ("mixtral", torch.float32)]
)
def test_a_leak_is_found_however_small(name, dtype, layer, share):
    model = deep(name, dtype)
    leaking(model, layer, share)
    rounding(model)
    with pytest.raises(InputError, match="one example changes the logits of the next by"):
        check_packing(model)
    with pytest.raises(InputError, match="one example changes the logits of another by"):
        check_sharing(model)


@pytest.mark.parametrize("dtype", ULP)
def test_a_segment_that_is_not_computed_as_alone_is_found(dtype, monkeypatch):
    """No leak, and wrong none the less: a layer that scales by where a token stands in the pack."""
    model = deep("mixtral", dtype)
    rounding(model)

    def before(module: nn.Module, args: tuple) -> tuple:
        scale = 1 + torch.arange(args[0].shape[-2], dtype=args[0].dtype)[:, None] / 8
        return (args[0] * scale, *args[1:])

    model.model.layers[20].self_attn.o_proj.register_forward_pre_hook(before)
    with pytest.raises(InputError, match="packed, a layer's states differ by"):
        check_packing(model)


def test_without_layers_that_it_knows_logits_are_compared(monkeypatch):
    """gpt2's positions are learned: with those of another example the logits are others."""
    monkeypatch.setattr(isolation, "GradientCheckpointingLayer", torch.nn.Bilinear)
    model = tiny.tiny_gpt2(initializer_range=0.1)
    set_attention(model, "segments", packing=True)
    check_packing(model)
    monkeypatch.setattr(isolation, "positions_of", lambda lengths, parents: list(range(sum(lengths))))
    with pytest.raises(InputError, match="differ by"):
        check_packing(model)
