"""How much memory a run will need: a few of its steps are tried, on its most demanding batches, and measured.

Nothing is guessed from a formula: which temporaries of the backward pass live at one time, what 4-bit weights are
unpacked to, how large a compiled kernel is, and what the heap loses to holes, the allocator alone knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator

from lowrank.data import Batch, BatchPlan, BatchStream, Members
from lowrank.ops.parts import parts_of
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import Loss
from lowrank.training.machine.memory import SETTLING_STEPS, freed_blocks_kept, peak_bytes
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.steps import StepSize

ADAM_BYTES = 2  # moments of AdamW, in values per trained value
GROWTH = 1.1  # holes in the heap, up to memory.WEAR, and what a step takes above them: six runs grew by 1.06 to 1.15
ACCUMULATED = 2  # the second batch of a step meets the gradients of the first; a third finds nothing new


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run: of the whole process on a CPU, of the allocator on CUDA.

    Attributes:
        total: All of it.
        program: The interpreter and its libraries, before rows and model; 0 on CUDA.
        weights: Of the base and the adapter.
        training: Gradients and the optimiser's state.
    """

    total: int
    program: int
    weights: int
    training: int

    @property
    def rest(self) -> int:
        """Activations and temporaries, logits, rows, compiled kernels, holes in the heap."""
        return max(0, self.total - self.program - self.weights - self.training)


def measured_memory(run: Run, program: int) -> MemoryEstimate:
    """What has been held at most, after `take_trial_steps`, with what the heap may still wear.

    Args:
        run: The one that took them.
        program: Bytes that the process held before the run was set up.
    """
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    device = trained[0].device
    peak = peak_bytes(device)
    state = [value for kept in run.optimizer.state.values() for value in kept.values()]
    return MemoryEstimate(
        total=peak if device.type == "cuda" else int(peak * GROWTH),
        program=0 if device.type == "cuda" else program,
        weights=sum(map(_bytes, run.model.parameters())),
        training=sum(_bytes(t) for t in [*trained, *state] if isinstance(t, torch.Tensor)),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def take_trial_steps(
    run: Run,
    plan: BatchPlan | BatchStream,
    loss: Loss,
    *,
    accelerator: Accelerator,
    size: StepSize,
    max_grad_norm: float,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> None:
    """The run's own loop, over the batches that need the most; the model is another one afterwards.

    Args:
        run: Has taken no step.
        plan: Its batches.
        loss: Its loss.
        accelerator: Runs the backward pass.
        size: Of its steps; a step of the trial holds two batches where they hold more.
        max_grad_norm: As in the run.
        penalty: As in the run.
    """
    if isinstance(plan, BatchStream):
        batches, most = [plan.largest()], size.batches if size.tokens is None else ACCUMULATED
    else:
        batches, most = _demanding(plan), int(np.diff([0, *size.ends(plan, 0)]).max())
    together = min(ACCUMULATED, most)
    trial = cast("BatchPlan", _Trial(list(islice(cycle(batches), SETTLING_STEPS * together))))
    run.callbacks = [*run.callbacks, _Ends()]
    size = StepSize(together)
    with freed_blocks_kept():
        fit(run, trial, loss, accelerator=accelerator, size=size, max_grad_norm=max_grad_norm, penalty=penalty)


@dataclass(frozen=True)
class _Trial:
    """What `fit` asks a plan for, over a few batches."""

    of: list[Batch]

    def epoch(self, epoch: int) -> list[Members]:
        return [Members(np.array([at])) for at in range(len(self.of))]

    def batch(self, members: Members) -> Batch:
        return self.of[members.rows[0]]

    def tokens(self, members: Members) -> int:
        return self.batch(members).tokens

    def computed(self, members: Members) -> int:
        return self.batch(members).computed

    def supervised(self, members: Members) -> int:
        return self.batch(members).supervised


class _Ends(Callback):
    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        run.stop |= run.step >= SETTLING_STEPS

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        run.stop |= run.step >= SETTLING_STEPS


def _demanding(plan: BatchPlan) -> list[Batch]:
    """Of the first epoch: the batch of the most tokens, of the longest example, of the most loss, and any others."""
    batches, lengths = plan.epoch(0), plan.examples.lengths

    def computed(at: int) -> int:
        return plan.computed(batches[at])

    def longest(at: int) -> int:
        return int(lengths[batches[at].rows].max())

    def supervised(at: int) -> int:
        return plan.supervised(batches[at])

    first = [max(range(len(batches)), key=measure) for measure in (computed, longest, supervised)]
    order = list(dict.fromkeys([*first, *range(len(batches))]))
    return [plan.batch(batches[at]) for at in order[: SETTLING_STEPS * ACCUMULATED]]
