"""One evaluation of a model as a config asks for it: the loss, and the answers where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank.config import RunConfig
from lowrank.data import Examples, Question, questions_of
from lowrank.errors import InputError
from lowrank.models import positions_of
from lowrank.recipes.parts.prepare import batch_plan
from lowrank.training.callbacks.progress import Task
from lowrank.training.evaluation.answers import MATCHES, answer_all, answer_text, is_json
from lowrank.training.evaluation.evaluation import Evaluation, Sample, losses_of
from lowrank.training.losses.supervised import Loss
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.machine.ranks import ALONE, Ranks


def assess(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    config: RunConfig,
    loss: Loss,
    task: Task,
    *,
    generate: bool,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Loss per supervised token, and with `generate` the answer to every row; processes share the work.

    A row is asked what was trained as its last answer, behind the tokens that stood before it then.

    Raises:
        InputError: answers are to be compared as JSON, and a row's own answer is not JSON.
    """
    plan = batch_plan(config, examples, tokenizer, shuffle=False)
    with task("evaluating", len(plan.epoch(0))) as advance, freed_blocks_kept():
        losses = losses_of(model, plan, loss, advance, ranks)
    if not generate:
        return Evaluation(losses.mean, losses.count)
    questions = questions_of(examples, tokenizer, config.data.format, config.data.date)
    prompts = [question.prompt for question in questions]
    expected = expected_answers(questions, tokenizer, config)
    _refuse_no_room(examples, prompts, positions_of(model), config)
    sharers = ALONE if config.training.fsdp else ranks  # a sharded base takes all processes for every token
    mine = prompts[sharers.index :: sharers.count]
    with task("answering", len(mine)) as advance, freed_blocks_kept(False):
        found = answer_all(
            model,
            tokenizer,
            mine,
            max_new_tokens=config.training.generation_max_new_tokens,
            batch_size=config.training.per_device_eval_batch_size,
            on_batch=advance,
        )
    shares = sharers.all(found)
    answers = [shares[i % sharers.count][i // sharers.count] for i in range(len(prompts))]
    same = MATCHES[config.training.exact_match]
    of_row = losses.by_row(examples.table.example_rows[examples.order])
    samples = tuple(
        Sample(
            str(tokenizer.decode(question.prompt)),
            right,
            answer,
            same(answer, right),
            question.turns,
            of_row.get(question.row),
        )
        for question, right, answer in zip(questions, expected, answers, strict=True)
    )
    return Evaluation(losses.mean, losses.count, sum(sample.correct for sample in samples) / len(samples), samples)


def _refuse_no_room(
    examples: Examples, prompts: Sequence[Sequence[int]], positions: int | None, config: RunConfig
) -> None:
    """Raises InputError where an answer to the longest prompt could go beyond the model's positions."""
    longest, asked = max(map(len, prompts), default=0), config.training.generation_max_new_tokens
    if positions is not None and longest + asked > positions:
        raise InputError(
            f"answers of {asked} tokens to prompts of up to {longest} go beyond the model's {positions} positions",
            where="training.generation_max_new_tokens",
            fix=f"Set it to {max(positions - longest, 1)} at most, or leave long rows out of {examples.rows.name}.",
        )


def expected_answers(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> list[str]:
    """What was trained as the last answer of each row, read as generated answers are.

    Raises:
        InputError: answers are to be compared as JSON, and one is not JSON.
    """
    answers = [answer_text(tokenizer, question.answer[:-1]) for question in questions]
    if config.training.exact_match == "json":
        for i, answer in enumerate(answers):
            if not is_json(answer):
                raise InputError(
                    f"the answer of example {i + 1} is not JSON: {answer[:60]!r}",
                    where=str(config.data.eval),
                    fix="Set training.exact_match: text, or mend the row.",
                )
    return answers
