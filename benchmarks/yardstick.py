"""How many operations a LoRA step needs, and how fast this machine multiplies matrices of a model's shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoConfig, PretrainedConfig

ROWS = 1024  # tokens in a product
SECONDS = 2.0


def layer_shapes(config: PretrainedConfig) -> Iterator[tuple[int, int]]:
    """(in, out) of the linear modules of one layer of a Llama."""
    hidden, wide = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    yield hidden, config.num_attention_heads * head
    for _ in range(2):
        yield hidden, config.num_key_value_heads * head
    yield config.num_attention_heads * head, hidden
    for _ in range(2):
        yield hidden, wide
    yield wide, hidden


def operations_a_token(folder: str, supervised: float) -> float:
    """What the base's products in a LoRA step take for a token: forward, and backward to the inputs alone.

    Args:
        folder: Of the base.
        supervised: The share of the tokens that carry loss: the head is needed for them alone.
    """
    config = AutoConfig.from_pretrained(folder)
    layer = sum(width * out for width, out in layer_shapes(config))
    return 2 * 2 * (config.num_hidden_layers * layer + supervised * config.hidden_size * config.vocab_size)


def operations_beside(folder: str, r: int, lengths: Sequence[int]) -> float:
    """What a LoRA step needs for a token beside the base's products, on average over rows of `lengths`.

    That is six low-rank products for each module (two forward, and the gradients of both factors, of what is between
    them and of the input), and attention's two products forward and four backward over the pairs that a causal mask
    leaves; nothing that is computed twice.
    """
    config = AutoConfig.from_pretrained(folder)
    low_rank = 6 * r * sum(width + out for width, out in layer_shapes(config))
    pairs = sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)
    _, query = next(layer_shapes(config))
    return config.num_hidden_layers * (low_rank + 2 * 6 * query * pairs)


def product_rate(folder: str, dtype: torch.dtype, device: str, seconds: float = SECONDS) -> float:
    """Floating-point operations a second of the plain products of one layer, by the median of many passes."""
    shapes = list(layer_shapes(AutoConfig.from_pretrained(folder)))
    pairs = [
        (torch.randn(ROWS, width, device=device, dtype=dtype), torch.randn(out, width, device=device, dtype=dtype))
        for width, out in shapes
    ]
    took, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(took) < 3:
        began = time.perf_counter()
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return 2 * ROWS * sum(width * out for width, out in shapes) / statistics.median(took)
