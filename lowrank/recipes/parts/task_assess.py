"""One evaluation of a task: its loss, its figures, and what is said to the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lowrank.data import BatchPlan
from lowrank.tasks.task import Task
from lowrank.training.callbacks.progress import Task as Progress
from lowrank.training.evaluation.evaluation import Evaluation, Sample
from lowrank.training.machine.ranks import ALONE, Ranks


def assess_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: BatchPlan,
    task: Task,
    progress: Progress,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The loss a mark, the task's figures, and each row's answer; processes share the work.

    Args:
        model: As it is asked.
        tokenizer: Of the model.
        held_out: What it is measured on.
        task: With its labels.
        progress: Shows how far it is.
        dtype: Of products.
        ranks: The processes; all get the whole result.
    """
    with progress("evaluating", len(held_out.epoch(0))) as advance:
        outputs, losses = _outputs_of(model, held_out, task, dtype, advance, ranks)
    examples = held_out.examples
    answers = task.answers(outputs, examples, tokenizer)
    samples = tuple(
        Sample(asked, right, said, said == right, (), float(loss) / len(own))
        for (asked, right, said), own, loss in zip(answers, outputs, losses, strict=True)
    )
    marks = sum(map(len, outputs))
    return Evaluation(float(losses.sum()) / marks, marks, samples=samples, scores=task.scores(outputs, examples))


@torch.no_grad()
def _outputs_of(
    model: Any,
    plan: BatchPlan,
    task: Task,
    dtype: torch.dtype,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[list[np.ndarray], np.ndarray]:
    """What the model gives for each example's marks, (m, ...) each, and the sums of their losses, (E,) float64."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    mine: list[tuple[np.ndarray, list[np.ndarray], np.ndarray]] = []
    left = iter(plan.epoch(0))
    while group := list(islice(left, ranks.count)):
        if ranks.index < len(group):
            members = group[ranks.index]
            batch = plan.batch(members).to(device)
            with torch.autocast(device.type, dtype, enabled=model.dtype == torch.float32 != dtype):
                outputs = task.outputs(model, batch)
            marks = [int(plan.examples.arrays(int(index))[1].sum()) for index in members.rows]
            sums = [one.sum() for one in by_row(task.losses(outputs, batch).double().cpu().numpy(), marks)]
            mine.append((members.rows, by_row(outputs.cpu().numpy(), marks), np.array(sums)))
        if on_batch is not None:
            on_batch(len(group))
    model.train(was_training)
    parts = [part for share in ranks.all(mine) for part in share]
    order = np.argsort(np.concatenate([rows for rows, *_ in parts]))
    every = [row for _, outputs, _ in parts for row in outputs]
    return [every[at] for at in order.tolist()], np.concatenate([losses for *_, losses in parts])[order]


def by_row(outputs: np.ndarray, marks: Sequence[int]) -> list[np.ndarray]:
    """What the model gives for the marks of a batch, row by row."""
    return np.split(outputs, np.cumsum(marks)[:-1])
