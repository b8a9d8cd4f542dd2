"""NEFTune (Jain 2023): noise on the embeddings while training, which makes answers less of an echo of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lowrank.attention.packing import announced_segments


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """While it lasts, and in training mode only, uniform noise of ±alpha / √(L · d) is added to the input embeddings.

    L is the length of the example that a token belongs to, not of the pack that the example lies in: packed and apart
    get noise of the same size. In a padded batch it is the batch's length, as in the paper's code.

    Args:
        model: A causal language model.
        alpha: The paper takes 5 to 15.
    """

    def add_noise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        lengths = _lengths_of(output, announced_segments(model))
        bound = alpha / (lengths * output.shape[-1]).sqrt().to(output)
        return output + (2.0 * torch.rand_like(output) - 1.0) * bound[:, None]

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _lengths_of(output: torch.Tensor, segments: Sequence[int] | None) -> torch.Tensor:
    """For each position of (b, n, d) embeddings the length of its example, (n,) float."""
    lengths = torch.tensor(segments or [output.shape[1]])
    return lengths.repeat_interleave(lengths).float()
