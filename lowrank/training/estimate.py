"""How much memory a run will need: a few of its steps are tried, on its most demanding batches, and measured.

Nothing is guessed from a formula: which temporaries of the backward pass live at one time, what 4-bit weights are
unpacked to, how large a compiled kernel is, and what the heap loses to holes, the allocator alone knows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise

import torch
from accelerate import Accelerator

from lowrank.data import Batch
from lowrank.data.batches.order import Batches
from lowrank.ops.parts import parts_of
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import Loss
from lowrank.training.machine.card_memory import beside_tensors
from lowrank.training.machine.memory import SETTLING_STEPS, freed_blocks_kept, peak_bytes
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.steps import Group, StepSize

ADAM_BYTES = 2  # moments of AdamW, in values per trained value
GROWTH = 1.1  # holes in the heap, up to memory.WEAR, and what a step takes above them: six runs grew by 1.06 to 1.15
ACCUMULATED = 2  # the second batch of a step meets the gradients of the first; a third finds nothing new


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run: of the whole process on a CPU, of the card on CUDA.

    Attributes:
        total: All of it.
        program: The interpreter and its libraries, before rows and model; 0 on CUDA.
        weights: Of the base and the adapter; of offloaded layers, two.
        training: Gradients and the optimiser's state.
        beside: What of a card holds no tensor, each kind by its name (`beside_tensors`).
    """

    total: int
    program: int
    weights: int
    training: int
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def rest(self) -> int:
        """Activations and temporaries, logits, rows, compiled kernels, holes in the heap."""
        return max(0, self.total - self.program - self.weights - self.training - sum(self.beside.values()))


def measured_memory(run: Run, program: int, processes: int = 1, elsewhere: int = 0) -> MemoryEstimate:
    """What has been held at most, after `take_trial_steps`, with what the heap may still wear.

    Args:
        run: The one that took them.
        program: Bytes that the process held before the run was set up.
        processes: Of the run that is foretold.
        elsewhere: Bytes of weights that are never there together with the rest.
    """
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    device = trained[0].device
    peak, beside = peak_bytes(device), beside_tensors(device, processes)
    state = [value for kept in run.optimizer.state.values() for value in kept.values()]
    return MemoryEstimate(
        total=peak + sum(beside.values()) if device.type == "cuda" else int(peak * GROWTH),
        program=0 if device.type == "cuda" else program,
        weights=sum(map(_bytes, run.model.parameters())) - elsewhere,
        training=sum(_bytes(t) for t in [*trained, *state] if isinstance(t, torch.Tensor)),
        beside=beside,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def take_trial_steps(
    run: Run,
    plan: Batches,
    loss: Loss,
    *,
    accelerator: Accelerator,
    size: StepSize,
    max_grad_norm: float,
    penalty: Callable[[], torch.Tensor] | None = None,
    prepare: Callable[[Group], None] | None = None,
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
        prepare: As in the run.
    """
    together = min(ACCUMULATED, _in_a_step(size, plan.sizes(0)))
    batches = plan.demanding(SETTLING_STEPS * ACCUMULATED)
    trial = _Trial(list(islice(cycle(batches), SETTLING_STEPS * together)))
    run.callbacks = [*run.callbacks, _Ends()]
    size = StepSize(together)
    with freed_blocks_kept():
        fit(
            run,
            trial,
            loss,
            accelerator=accelerator,
            size=size,
            max_grad_norm=max_grad_norm,
            penalty=penalty,
            prepare=prepare,
        )


@dataclass(frozen=True)
class _Trial:
    """A few batches as an order."""

    of: list[Batch]

    def sizes(self, epoch: int) -> list[int]:
        return [batch.tokens for batch in self.of]

    def upcoming(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        yield from self.of[start:]


class _Ends(Callback):
    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        run.stop |= run.step >= SETTLING_STEPS

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        run.stop |= run.step >= SETTLING_STEPS


def _in_a_step(size: StepSize, sizes: Sequence[int] | None) -> int:
    """The most batches of a step, as far as it matters here, where the first epoch's have so many tokens."""
    if sizes is None:
        return size.batches if size.tokens is None else ACCUMULATED
    return max(end - begin for begin, end in pairwise([0, *size.ends(sizes)]))
