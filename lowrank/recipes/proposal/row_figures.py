"""What the rows are: how many, how long, what their answers look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.config.sections import DataSection, TrainingSection
from lowrank.data import Examples, answer_of, load_examples, use_template
from lowrank.data.reading.sources import Joined, open_sources
from lowrank.data.supervision.choose_template import TEMPLATES, fitting_templates
from lowrank.errors import InputError
from lowrank.recipes.parts.preference_rows import read_preference_examples
from lowrank.recipes.parts.tasked import task_of_rows
from lowrank.tasks.reading import read_task_rows
from lowrank.tasks.registry import TASKS
from lowrank.tasks.task import Wishes

SAMPLE = 5_000
ANY_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class RowFacts:
    """A set of rows.

    Attributes:
        path: As it was given.
        count: All of them.
        format: A key of `FORMATS`.
        lengths: Tokens of each example of a sample, (S,).
        supervised: Those that carry loss, (S,).
        json: Whether the answers are JSON.
        duplicates: Of the sample, how many have occurred before.
        task: The task that they make plain, None for the next token.
        template: The chat template that the tokenizer lacks and the rows need; None where it has one or none is needed.
        objective: What rows of preferences are for; None for others. Their lengths are those of the longer answer, the
            prompt's too.
    """

    path: str
    count: int
    format: str
    lengths: np.ndarray
    supervised: np.ndarray
    json: bool = False
    duplicates: int = 0
    template: str | None = None
    task: str | None = None
    objective: str | None = None

    @property
    def sampled(self) -> bool:
        """Whether the sample is less than all."""
        return self.count > SAMPLE

    @property
    def text(self) -> bool:
        """Whether the rows are plain text, every token of which is learned."""
        return self.format == "text"


def rows_of(path: str, tokenizer: PreTrainedTokenizerBase) -> RowFacts:
    """Reads the rows and tokenises a sample of them; gives the tokenizer a chat template where the rows need one.

    Raises:
        InputError: whatever a run would say of them.
    """
    joined = Joined(open_sources(path, None))
    if not len(joined):
        raise InputError("there are no rows", where=path)
    task = task_of_rows(path)
    if task is not None:
        return _labelled(path, len(joined), task, tokenizer)
    kind = joined.parts[0].format
    template = _missing_template(kind, tokenizer)
    if template is not None:
        use_template(tokenizer, template)
    objective = "kto" if _rated(joined) else "dpo" if kind == "preference" else None
    if objective is not None:
        return _preferred(path, len(joined), kind, objective, template, tokenizer)
    examples = load_examples(
        path,
        tokenizer,
        train_on="all" if kind == "text" else "assistant",
        max_length=ANY_LENGTH,
        too_long="drop",
        max_rows=SAMPLE,
    )
    supervised = np.array([int(examples.arrays(at)[1].sum()) for at in range(len(examples))])
    return RowFacts(
        path=path,
        count=len(joined),
        format=kind,
        lengths=examples.lengths,
        supervised=supervised,
        json=kind != "text" and _are_json(_answers(examples)),
        duplicates=examples.report.duplicates,
        template=template,
    )


def _rated(rows: Joined) -> bool:
    """Whether the first row says of an answer that it is wanted, or not."""
    return isinstance(rows[0].get("label"), bool)


def _preferred(
    path: str, count: int, kind: str, objective: str, template: str | None, tokenizer: PreTrainedTokenizerBase
) -> RowFacts:
    """Rows of preferences."""
    data = DataSection(train=path, max_length=ANY_LENGTH, too_long="drop", max_train_rows=SAMPLE)
    examples, _ = read_preference_examples(data, TrainingSection(output_dir="-", objective=objective), tokenizer)
    longest = examples.table.row_lengths[examples.table.example_rows]
    supervised = np.array([int(examples.arrays(at)[1].sum()) for at in range(len(examples))])
    repeats = examples.report.duplicates
    return RowFacts(path, count, kind, longest, supervised, duplicates=repeats, template=template, objective=objective)


def _labelled(path: str, count: int, task: str, tokenizer: PreTrainedTokenizerBase) -> RowFacts:
    """Rows of a task other than the next token."""
    examples = read_task_rows(
        path,
        TASKS[task].encoder(Wishes()),
        tokenizer,
        max_length=ANY_LENGTH,
        too_long="drop",
        bad_rows="error",
        columns=None,
        max_rows=SAMPLE,
    )
    TASKS[task].learned_from(examples, Wishes())
    supervised = np.array([int(examples.arrays(at)[1].sum()) for at in range(len(examples))])
    repeats = examples.report.duplicates
    return RowFacts(path, count, task, examples.lengths, supervised, duplicates=repeats, task=task)


def _missing_template(kind: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if kind not in ("messages", "sharegpt") or tokenizer.chat_template is not None:
        return None
    fitting = [name for name in fitting_templates(tokenizer) if TEMPLATES[name]]
    return fitting[0] if fitting else "plain"


def _answers(examples: Examples) -> list[str]:
    return [answer_of(examples.row(at)) for at in range(min(200, len(examples)))]


def _are_json(answers: Sequence[str]) -> bool:
    return bool(answers) and all(answer.lstrip()[:1] in ("{", "[") and _parses(answer) for answer in answers)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
