"""NEFTune (Jain 2023): noise on the embeddings while training, which makes answers less of an echo of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowrank.attention.announced import ANNOUNCED, Announced
from lowrank.attention.forest import starts_of


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """While it lasts, and in training mode only, uniform noise of ±alpha / √(L · d) is added to the input embeddings.

    L is the length of the example that a token belongs to, not of the pack that the example lies in: packed and apart
    get noise of the same size. What examples share gets noise once, of the size for the longest of them. In a padded
    batch L is the batch's length, as in the paper's code.

    Args:
        model: A causal language model.
        alpha: The paper takes 5 to 15.
    """

    def add_noise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        lengths = _lengths_of(output, ANNOUNCED.get(id(model.config)))
        bound = alpha / (lengths * output.shape[-1]).sqrt().to(output)
        return output + (2.0 * torch.rand_like(output) - 1.0) * bound[:, None]

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _lengths_of(output: torch.Tensor, pack: Announced | None) -> torch.Tensor:
    """For each position of (b, n, d) embeddings the length of the longest example that it belongs to, (n,) float."""
    segments = [output.shape[1]] if pack is None else pack.lengths
    parents = None if pack is None else pack.parents
    lengths = [start + length for start, length in zip(starts_of(segments, parents), segments, strict=True)]
    for segment in reversed(range(len(segments))):
        if parents is not None and parents[segment] >= 0:
            lengths[parents[segment]] = max(lengths[parents[segment]], lengths[segment])
    return torch.tensor(lengths).repeat_interleave(torch.tensor(segments)).float()
