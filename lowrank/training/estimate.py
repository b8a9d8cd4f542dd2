"""How much memory a run will need, from one forward pass of its largest batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowrank.attention import segments
from lowrank.data import Batch
from lowrank.ops.cross_entropy import CHUNK_BYTES
from lowrank.training.loss import Loss

ADAM_BYTES = 2  # moments of AdamW, in values per trained value
CHUNKS = 3  # logits of one chunk in float32, in the head's dtype, and their softmax


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step, by what holds them.

    Attributes:
        weights: Of the base and the adapter.
        training: Gradients and AdamW's moments of what trains.
        activations: What the backward pass of the largest batch needs.
        logits: One chunk of them.
    """

    weights: int
    training: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it; the interpreter and its libraries not counted."""
        return self.weights + self.training + self.activations + self.logits


def estimate_memory(model: Any, loss: Loss, batch: Batch) -> MemoryEstimate:
    """Runs `batch` forward, in training mode, and counts what autograd keeps.

    The random state is put back: a run after it is the same as one without.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.train()
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        segments(model, batch.segments),
    ):
        value = loss(model, batch.to(device))
    activations = sum(kept.values())
    del value
    model.train(was_training)
    trained = [p for p in model.parameters() if p.requires_grad]
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        training=sum(p.numel() * p.element_size() * (1 + ADAM_BYTES) for p in trained),
        activations=activations,
        logits=CHUNKS * CHUNK_BYTES,
    )
