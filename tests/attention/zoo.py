"""Tiny models of many architectures, and the same examples given to them apart, padded and packed."""

from __future__ import annotations

from collections.abc import Callable

import tiny
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lowrank.adapters import LoraConfig, wrap
from lowrank.attention import positions_of, segments

# Large enough that attention is far from uniform: with the usual 0.02 a leak would hide in the rounding.
SPREAD = {"initializer_range": 0.1}
LENGTHS = (40, 3, 17, 40, 33, 1)


def _sized(config: type, **more: object) -> Callable[[], PreTrainedModel]:
    return lambda: tiny.build(config(**{**tiny._LLAMA_LIKE, **SPREAD, **more}))


_WINDOW = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

ZOO: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _sized(transformers.LlamaConfig),
    "mistral-window-16": _sized(transformers.MistralConfig, sliding_window=16),
    "mistral-window-40": _sized(transformers.MistralConfig, sliding_window=40),
    "mistral-window-64": _sized(transformers.MistralConfig, sliding_window=64),  # longer than any segment
    "qwen2": _sized(transformers.Qwen2Config),
    "qwen2-window-16": _sized(transformers.Qwen2Config, **_WINDOW),
    "qwen3": _sized(transformers.Qwen3Config, head_dim=16),
    "qwen3_moe": _sized(transformers.Qwen3MoeConfig, head_dim=16, **_MOE),
    "mixtral": _sized(transformers.MixtralConfig, **_MOE),
    "gemma": _sized(transformers.GemmaConfig, head_dim=8),
    "gemma2": _sized(transformers.Gemma2Config, head_dim=8, attn_logit_softcapping=2.0, **_MIXED),
    "gemma3": _sized(transformers.Gemma3TextConfig, head_dim=8, query_pre_attn_scalar=8, **_MIXED),
    "phi3": _sized(transformers.Phi3Config, **_NO_DROPOUT),
    "olmo2": _sized(transformers.Olmo2Config),
    "granite": _sized(transformers.GraniteConfig, attention_multiplier=0.3),
    "starcoder2": _sized(transformers.Starcoder2Config, sliding_window=16),
    "stablelm": _sized(transformers.StableLmConfig, **_NO_DROPOUT),
    "smollm3": _sized(transformers.SmolLM3Config),
    "cohere2": _sized(transformers.Cohere2Config, **_MIXED),
    "gpt_oss": _sized(transformers.GptOssConfig, head_dim=8, **_MIXED, **_MOE),
    "llama4-chunk-16": _sized(
        transformers.Llama4TextConfig,
        head_dim=8,
        attention_chunk_size=16,
        intermediate_size_mlp=48,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "opt": lambda: tiny.build(
        transformers.OPTConfig(
            **{**tiny._LLAMA_LIKE, "num_key_value_heads": 4},
            ffn_dim=48,
            word_embed_proj_dim=32,
            dropout=0.0,
            init_std=0.1,
        )
    ),
    "gpt2": lambda: tiny.tiny_gpt2(**SPREAD),
    "gpt_neox": _sized(transformers.GPTNeoXConfig, num_key_value_heads=4, **_NO_DROPOUT),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model, with random sinks if it has any."""
    model = ZOO[name]().to(dtype)
    for path, parameter in model.named_parameters():
        if path.endswith("sinks"):
            nn.init.normal_(parameter)
    return model


def adapted(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with adapters whose both factors are random, so that both receive gradients.

    Base weights are numbers that bfloat16 holds, so that the same model exists in both precisions.
    """
    return adapt(build(name, torch.bfloat16).to(dtype))


def adapt(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapters of `adapted`."""
    torch.manual_seed(1)
    wrap(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in path:
            nn.init.normal_(parameter, std=0.1)
    return model


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Rows (1, n) of random ids."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, tiny.VOCAB, (1, n), generator=generator) for n in lengths]


def one_by_one(
    model: PreTrainedModel, prompts: list[list[int]], generation: transformers.GenerationConfig
) -> list[list[int]]:
    """transformers' answer to each prompt alone."""
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return [model.generate(row, generation_config=generation)[0, row.shape[1] :].tolist() for row in rows]


Result = dict[str, torch.Tensor]


def apart(model: PreTrainedModel, rows: list[torch.Tensor]) -> Result:
    """One row after the other."""
    return _run(model, rows, [(row, {}, torch.ones_like(row, dtype=torch.bool), None) for row in rows])


def packed(model: PreTrainedModel, rows: list[torch.Tensor], announce: bool = True) -> Result:
    """All rows in one."""
    lengths = [row.shape[1] for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.cat(rows, dim=1)
    batch = (ids, {"position_ids": positions}, torch.ones_like(ids, dtype=torch.bool), lengths if announce else None)
    return _run(model, rows, [batch])


def padded(model: PreTrainedModel, rows: list[torch.Tensor], side: str) -> Result:
    """All rows as one batch, filled up on one side."""
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return _run(model, rows, [(ids, {"attention_mask": mask, "position_ids": positions}, mask.bool(), None)])


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (b, n), attention mask (b, n))."""
    longest = max(row.shape[1] for row in rows)
    fills = [longest - row.shape[1] for row in rows]
    sides = [(fill, 0) if side == "left" else (0, fill) for fill in fills]
    pair = [
        (nn.functional.pad(row, s), nn.functional.pad(torch.ones_like(row), s))
        for row, s in zip(rows, sides, strict=True)
    ]
    return torch.cat([ids for ids, _ in pair]), torch.cat([mask for _, mask in pair])


TREE = (17, 5, 1, 20, 3, 9, 12, 1, 30, 1, 2)
"""Segments of a forest: three levels under the first, children beside their parents and far from them."""
PARENTS = (-1, 0, 0, 1, -1, 3, 4, 5, -1, 0, 0)


def paths(parents: tuple[int, ...]) -> list[list[int]]:
    """The segments of each example: every one that nobody goes on from, after its ancestors."""
    found = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        found.append(path)
    return found


def forest(
    model: PreTrainedModel, lengths: tuple[int, ...] = TREE, parents: tuple[int, ...] = PARENTS
) -> tuple[Result, Result]:
    """What the examples of a forest give alone, and what the forest gives: logits and gradients, in the pack's order.

    The reference's logits are those of each example one after the other, and so are the forest's.
    """
    parts = examples(lengths)
    rows = [torch.cat([parts[number] for number in path], dim=1) for path in paths(parents)]
    places = [torch.arange(sum(lengths)).split(lengths)[number] for path in paths(parents) for number in path]
    place = torch.cat(places)
    direction = torch.randn(len(place), tiny.VOCAB, generator=torch.Generator().manual_seed(3))
    alone = _run(model, rows, [(row, {}, torch.ones_like(row, dtype=torch.bool), None) for row in rows])
    alone["inputs"] = torch.zeros(sum(lengths), alone["inputs"].shape[1]).index_add(0, place, alone["inputs"])
    ids, positions = torch.cat(parts, dim=1), torch.tensor([positions_of(lengths, parents)])
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with segments(model, lengths, parents):
        logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0].float()[place]
        (logits * direction).sum().backward()
    grads = {path: p.grad.float() for path, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return alone, {"logits": logits.detach(), "inputs": embedded.grad[0].float(), **grads}


def _run(model: PreTrainedModel, rows: list[torch.Tensor], batches: list[tuple]) -> Result:
    """Logits, and gradients of the embedded inputs and of the trainable parameters, in the order of the rows."""
    generator = torch.Generator().manual_seed(3)
    total = sum(row.shape[1] for row in rows)
    direction = torch.randn(total, tiny.VOCAB, generator=generator)
    device = next(model.parameters()).device
    direction = direction.to(device)
    model.zero_grad()
    logits, inputs, seen = [], [], 0
    for ids, arguments, real, lengths in batches:
        arguments = {name: x.to(device) for name, x in arguments.items()}
        embedded = model.get_input_embeddings()(ids.to(device)).detach().requires_grad_()
        with segments(model, lengths):
            out = model(inputs_embeds=embedded, use_cache=False, **arguments).logits[real].float()
            (out * direction[seen : seen + len(out)]).sum().backward()
        seen += len(out)
        logits.append(out.detach().cpu())
        inputs.append(embedded.grad[real].float().cpu())
    grads = {
        path: p.grad.float().cpu() for path, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    return {"logits": torch.cat(logits), "inputs": torch.cat(inputs), **grads}


def difference(result: Result, reference: Result) -> dict[str, float]:
    """Norm of each tensor's difference, as a share of the reference's norm."""
    assert result.keys() == reference.keys()
    return {k: float((result[k] - ref).norm() / ref.norm().clamp(min=1e-6)) for k, ref in reference.items()}
