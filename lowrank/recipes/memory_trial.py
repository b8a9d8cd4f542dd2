"""What a run would hold in memory, from trying all that it would do: the first steps, an evaluation, answers."""

from __future__ import annotations

from contextlib import nullcontext

from lowrank.config import RunConfig
from lowrank.data import questions_of
from lowrank.recipes.parts.rank_budget import rank_budget
from lowrank.recipes.parts.setup import Setup
from lowrank.recipes.train import accelerator_for, new_run, try_the_longest
from lowrank.training.estimate import MemoryEstimate, measured_memory, take_trial_steps
from lowrank.training.evaluation.answers import answer_all
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.transforms.neftune import noisy_embeddings


def estimate_memory(config: RunConfig, setup: Setup, program: int) -> MemoryEstimate:
    """Trains `setup`'s model for a few steps and drops it.

    Args:
        config: Of the run.
        setup: Of the run; it is used up.
        program: Bytes that the process held before the setup.

    Raises:
        JobError: there is not enough memory.
    """
    training = config.training
    run = new_run(config, setup)
    budget = rank_budget(setup.model, run.total_steps)
    run.callbacks = [*budget]
    accelerator = accelerator_for(config)
    try_the_longest(run, config, setup, accelerator)
    if training.predict_with_generate:
        _answer_the_longest(config, setup)
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
        )
    return measured_memory(run, program)


def _answer_the_longest(config: RunConfig, setup: Setup) -> None:
    """One batch of answers: the cache of keys and values is at its largest for the longest prompts."""
    examples, batch_size = setup.held_out, config.training.per_device_eval_batch_size
    assert examples is not None, "the config has refused it"
    prompts = [
        question.prompt for question in questions_of(examples, setup.tokenizer, config.data.format, config.data.date)
    ]
    with freed_blocks_kept(False):
        answer_all(
            setup.model,
            setup.tokenizer,
            sorted(prompts, key=len)[-batch_size:],
            max_new_tokens=config.training.generation_max_new_tokens,
            batch_size=batch_size,
        )
