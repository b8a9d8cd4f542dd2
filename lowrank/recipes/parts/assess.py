"""One evaluation of a model: the loss, and the answers to an exam where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank.data import BatchPlan
from lowrank.recipes.parts.exam import Exam
from lowrank.training.callbacks.progress import Task
from lowrank.training.evaluation.answers import answer_all
from lowrank.training.evaluation.comparisons import COMPARISONS
from lowrank.training.evaluation.evaluation import Evaluation, Sample, losses_of
from lowrank.training.losses.supervised import Loss
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.machine.ranks import ALONE, Ranks


def assess(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: BatchPlan,
    loss: Loss,
    task: Task,
    exam: Exam | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Loss per supervised token, and the answers to an exam; processes share the work.

    Args:
        model: As it is asked.
        tokenizer: Of the model.
        held_out: What the loss is measured on.
        loss: Of a batch's supervised tokens.
        task: Shows how far it is.
        exam: The same rows as questions; None for the loss alone.
        ranks: The processes; all get the whole result.
    """
    with task("evaluating", len(held_out.epoch(0))) as advance, freed_blocks_kept():
        losses = losses_of(model, held_out, loss, advance, ranks)
    if exam is None:
        return Evaluation(losses.mean, losses.count)
    examples = held_out.examples
    of_row = losses.by_row(examples.table.example_rows[examples.order])
    samples = samples_of(exam, of_row, model, tokenizer, task, ranks)
    return Evaluation(losses.mean, losses.count, sum(sample.correct for sample in samples) / len(samples), samples)


def samples_of(
    exam: Exam,
    losses: Mapping[int | None, float],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    ranks: Ranks,
) -> tuple[Sample, ...]:
    """The model's answers to an exam, each with the loss of its row, where that is known."""
    answers = _answers_to(exam, model, tokenizer, task, ranks)
    same = COMPARISONS[exam.comparison]
    return tuple(
        Sample(
            str(tokenizer.decode(question.prompt)),
            right,
            answer,
            same(answer, right),
            question.turns,
            losses.get(question.row),
        )
        for question, right, answer in zip(exam.questions, exam.expected, answers, strict=True)
    )


def _answers_to(exam: Exam, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, ranks: Ranks) -> list[str]:
    """The model's answer to each question, on all processes."""
    sharers, prompts = ranks if exam.shared else ALONE, exam.prompts
    mine = prompts[sharers.index :: sharers.count]
    with task("answering", len(mine)) as advance, freed_blocks_kept(False):
        found = answer_all(
            model,
            tokenizer,
            mine,
            max_new_tokens=exam.max_new_tokens,
            batch_size=exam.batch_size,
            on_batch=advance,
        )
    shares = sharers.all(found)
    return [shares[i % sharers.count][i // sharers.count] for i in range(len(prompts))]
