"""What a run would hold in memory, from trying all that it would do: the first steps, an evaluation, answers."""

from __future__ import annotations

from contextlib import nullcontext

from lowrank.config.sections import ModelSection, TrainingSection
from lowrank.recipes.parts.beginning import joined_accelerator, new_run, try_the_longest
from lowrank.recipes.parts.companion import companions
from lowrank.recipes.parts.exam import Exam
from lowrank.recipes.parts.setup import Setup
from lowrank.training.estimate import MemoryEstimate, measured_memory, take_trial_steps
from lowrank.training.evaluation.answers import answer_all
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.machine.ranks import ALONE
from lowrank.training.transforms.neftune import noisy_embeddings


def estimate_memory(base: ModelSection, training: TrainingSection, setup: Setup, program: int) -> MemoryEstimate:
    """Trains `setup`'s model for a few steps and drops it.

    Args:
        base: Of the run.
        training: Of the run.
        setup: Of the run; it is used up.
        program: Bytes that the process held before the setup.

    Raises:
        InputError: what a run refuses as it begins: its optimiser, its rank budget, a tensor that gets no gradient.
        JobError: there is not enough memory.
    """
    run = new_run(training, setup)
    budget = companions(setup.model, run.total_steps)
    run.callbacks = [*budget]
    accelerator = joined_accelerator(training, setup.model.device)
    try_the_longest(setup, accelerator, base.name_or_path)
    if setup.exam is not None:
        _answer_the_longest(setup, setup.exam)
    alpha = training.neftune_noise_alpha
    with nullcontext() if alpha is None else noisy_embeddings(run.model, alpha):
        take_trial_steps(
            run,
            setup.plan,
            setup.loss,
            accelerator=accelerator,
            size=setup.size,
            max_grad_norm=training.max_grad_norm,
            penalty=budget[0].penalty if budget else None,
            prepare=setup.prepare(ALONE),
        )
    elsewhere = 0 if setup.offloaded is None else setup.offloaded.elsewhere
    return measured_memory(run, program, training.num_processes or 1, elsewhere)


def _answer_the_longest(setup: Setup, exam: Exam) -> None:
    """One batch of answers: the cache of keys and values is at its largest for the longest prompts."""
    with freed_blocks_kept(False):
        answer_all(
            setup.model,
            setup.tokenizer,
            sorted(exam.prompts, key=len)[-exam.batch_size :],
            max_new_tokens=exam.max_new_tokens,
            batch_size=exam.batch_size,
        )
