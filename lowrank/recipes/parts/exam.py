"""Held-out rows as questions whose answers are known: what an evaluation asks beside the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lowrank.config.sections import DataSection, TrainingSection
from lowrank.data import Examples, Question, questions_of
from lowrank.errors import InputError
from lowrank.training.evaluation.answers import answer_text
from lowrank.training.evaluation.comparisons import is_json


@dataclass(frozen=True)
class Exam:
    """Questions, and how they are asked.

    Attributes:
        questions: A row is asked what was trained as its last answer, behind the tokens that stood before it then.
        expected: What was trained as the answer of each, read as generated answers are.
        comparison: How the two are compared.
        max_new_tokens: The longest answer.
        batch_size: Questions that are answered at a time.
        shared: Whether processes share the questions; a sharded base takes all of them for every token.
    """

    questions: list[Question]
    expected: list[str]
    comparison: str
    max_new_tokens: int
    batch_size: int
    shared: bool

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each question."""
        return [question.prompt for question in self.questions]


def exam_of(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    training: TrainingSection,
    positions: int | None,
) -> Exam:
    """The questions of held-out rows, as a config wants them asked.

    Args:
        examples: The rows.
        tokenizer: The model's, with the chat template that is used.
        data: How the rows were read.
        training: How answers are generated and compared.
        positions: Of the model; None where they do not end.

    Raises:
        InputError: no row has an answer; answers are to be compared as JSON, and a row's own is not JSON; an answer to
            the longest question could go beyond the model's positions.
    """
    questions = questions_of(examples, tokenizer, data.format, data.date)
    exam = Exam(
        questions,
        [answer_text(tokenizer, question.answer[:-1]) for question in questions],
        training.exact_match,
        max_new_tokens=training.generation_max_new_tokens,
        batch_size=training.per_device_eval_batch_size,
        shared=not training.fsdp,
    )
    if exam.comparison == "json":
        _refuse_what_is_not_json(exam.expected, str(data.eval))
    _refuse_no_room(exam, positions, examples.rows.name)
    return exam


def _refuse_what_is_not_json(answers: Sequence[str], file: str) -> None:
    for i, answer in enumerate(answers):
        if not is_json(answer):
            raise InputError(
                f"the answer of example {i + 1} is not JSON: {answer[:60]!r}",
                where=file,
                fix="Set training.exact_match: text, or mend the row.",
            )


def _refuse_no_room(exam: Exam, positions: int | None, rows: str) -> None:
    longest, asked = max(map(len, exam.prompts), default=0), exam.max_new_tokens
    if positions is not None and longest + asked > positions:
        raise InputError(
            f"answers of {asked} tokens to prompts of up to {longest} go beyond the model's {positions} positions",
            where="training.generation_max_new_tokens",
            fix=f"Set it to {max(positions - longest, 1)} at most, or leave long rows out of {rows}.",
        )
