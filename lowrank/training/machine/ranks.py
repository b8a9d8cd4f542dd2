"""Several processes on one run: who takes which batches, and what they tell one another.

Each process holds the whole adapter and computes its share of a step's batches; the gradients are added up once a step.
The base is replicated, or sharded between the processes (`sharding.py`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lowrank.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, and which of them this one is.

    Attributes:
        index: This process, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, value: T) -> T:
        """What process 0 says."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def all(self, value: T) -> list[T]:
        """What each says, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so on any process; one number travels, and a card is waited for once."""
        if self.count == 1:
            return here
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        told = torch.full((), int(here), device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each parameter's gradient becomes the sum over all processes; one message for each dtype."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            same = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = self.total(torch.cat([gradient.flatten() for gradient in same]))
            for gradient, part in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
                gradient.copy_(part.view_as(gradient))


ALONE = Ranks()
"""One process."""


def joined_ranks(asked: int | None) -> Ranks:
    """The processes that torch.distributed has joined by now.

    Args:
        asked: How many there shall be; None for as many as were launched.

    Raises:
        InputError: there are not as many as were asked for. Some launchers start one process instead of several and do
            not say so; each would train by itself.
    """
    joined = dist.is_available() and dist.is_initialized()
    ranks = Ranks(dist.get_rank(), dist.get_world_size()) if joined else ALONE
    for wanted, by in ((os.environ.get("WORLD_SIZE"), "the launcher"), (asked, "training.num_processes")):
        if wanted is not None and int(wanted) != ranks.count:
            raise InputError(
                f"{by} asks for {int(wanted)} processes, and {ranks.count} joined the run",
                where="training.num_processes",
                fix="Start it with torchrun --nproc_per_node N -m lowrank train CONFIG.",
            )
    return ranks


def share(sizes: Sequence[int], ranks: Ranks) -> list[int]:
    """Which of a step's batches this process computes: as many tokens each as can be, and no one more than it must.

    Args:
        sizes: The batches' tokens.
        ranks: The processes; each takes at most ceil(len(sizes) / count) batches.

    Returns:
        Indices into `sizes`, ascending.
    """
    most = -(-len(sizes) // ranks.count)
    loads, taken = [0] * ranks.count, [[] for _ in range(ranks.count)]
    for at in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        rank = min((r for r in range(ranks.count) if len(taken[r]) < most), key=lambda r: (loads[r], r))
        taken[rank].append(at)
        loads[rank] += sizes[at]
    return sorted(taken[ranks.index])
