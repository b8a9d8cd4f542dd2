"""The rows of a task in batches, and what their labels are."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lowrank.config import RunConfig
from lowrank.config.sections import TrainingSection
from lowrank.data import BatchPlan, Examples, plan_batches
from lowrank.data.loading.load import first_rows, split_by_hash
from lowrank.recipes.parts.batches import sources_of
from lowrank.tasks.reading import read_task_rows
from lowrank.tasks.registry import TASKS
from lowrank.tasks.task import Task, Wishes


def task_examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Task, Examples, Examples | None]:
    """The task with the labels of the training rows, these rows, and those held out (None where there are none).

    Raises:
        InputError: a row cannot be used, the labels make no task, or a row that is held out has another label.
    """
    data, training, kind = config.data, config.training, TASKS[str(config.model.task)]
    wishes = Wishes(config.model.problem_type, training.class_weights, training.label_smoothing_factor)

    def read(sources: object, count: int | None) -> Examples:
        return read_task_rows(
            sources_of(sources),
            kind.encoder(wishes),
            tokenizer,
            max_length=data.max_length,
            too_long=data.too_long,
            bad_rows=data.bad_rows,
            columns=data.columns,
            transform=data.transform,
            max_rows=count,
        )

    train, held_out = read(data.train, data.max_train_rows), None
    if isinstance(data.eval, float):
        train, held_out = split_by_hash(train, data.eval)
        held_out = held_out if data.max_eval_rows is None else first_rows(held_out, data.max_eval_rows)
    elif data.eval is not None:
        held_out = read(data.eval, data.max_eval_rows)
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
