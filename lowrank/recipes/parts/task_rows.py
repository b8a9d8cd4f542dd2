"""The rows of a task in batches, and what their labels are."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lowrank.config import RunConfig
from lowrank.config.sections import TrainingSection
from lowrank.data import BatchPlan, Examples, plan_batches
from lowrank.recipes.parts.encoded_rows import encoded_rows
from lowrank.tasks.registry import TASKS
from lowrank.tasks.task import Task, Wishes


def task_examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Task, Examples, Examples | None]:
    """The task with the labels of the training rows, these rows, and those held out (None where there are none).

    Raises:
        InputError: a row cannot be used, the labels make no task, or a row that is held out has another label.
    """
    data, training, kind = config.data, config.training, TASKS[str(config.model.task)]
    wishes = Wishes(config.model.problem_type, training.class_weights, training.label_smoothing_factor)
    train, held_out = encoded_rows(data, kind.encoder(wishes), tokenizer)
    task = kind.learned_from(train, wishes)
    for examples in (train, held_out):
        if examples is not None:
            task.refuse_others(examples)
    return task, train, held_out


def task_plan(
    training: TrainingSection, task: Task, examples: Examples, tokenizer: PreTrainedTokenizerBase, *, shuffle: bool
) -> BatchPlan:
    """Examples in padded batches; shuffled, rows of a like length together, for training."""
    size = training.per_device_train_batch_size if shuffle else training.per_device_eval_batch_size
    plan = plan_batches(
        examples,
        packing=False,
        batch_size=size,
        max_tokens=None,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        shuffle=shuffle,
    )
    plan.collate = task.collate
    return plan
