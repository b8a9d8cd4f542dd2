"""The labels of rows: what kind they are of, how they are named and numbered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lowrank.data import Examples
from lowrank.data.reading.row_error import RowError
from lowrank.errors import InputError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
"""transformers' names."""
Label = str | float | tuple[str, ...]
"""A class's name, a number, or the names of several classes."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a model's outputs stand for.

    Attributes:
        problem_type: One of `PROBLEM_TYPES`.
        names: Of the classes, in the order of the outputs; none for a regression.
    """

    problem_type: str
    names: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of a model's config that say so."""
        if self.problem_type == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
            "problem_type": self.problem_type,
        }

    @classmethod
    def of_config(cls, config: Any) -> Labels:
        """As a model's config says; where it names no problem, it is one label of several."""
        kind = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
        names = () if kind == REGRESSION else tuple(config.id2label[number] for number in range(config.num_labels))
        return cls(kind, names)

    def number(self, label: Label) -> float | int | list[float]:
        """The label as a batch holds it: a number of a class, a value, or ones and zeros."""
        if self.problem_type == REGRESSION:
            return float(label)  # pyrefly: ignore[bad-argument-type]
        if isinstance(label, tuple):
            return [float(name in label) for name in self.names]
        return self.names.index(str(label))

    def refuse_others(self, examples: Examples) -> None:
        """Raises InputError where an example has a label that is none of these."""
        for index in range(len(examples)):
            label = examples.payload(index).label
            where = place_of(examples, index)
            if (self.problem_type == REGRESSION) != isinstance(label, float) or (
                (self.problem_type == MULTI) != isinstance(label, tuple)
            ):
                raise InputError(f"the label is {label!r}, and others make this a {self.problem_type}", where=where)
            for name in () if isinstance(label, float) else label if isinstance(label, tuple) else (label,):
                if name not in self.names:
                    raise InputError(
                        f"the label {name!r} is none of those that training shows",
                        where=where,
                        fix=f"Those are {', '.join(map(repr, self.names[:20]))}. Add rows with it, or mend the row.",
                    )


def label_of(value: Any) -> Label:
    """The label of a row: a name (text, whole number, true or false), a number with a point, or a list of names.

    Raises:
        RowError: it is none of these.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise RowError(f"the label is {value}", "Write a finite number.")
        return value
    if isinstance(value, (int, str)):
        if not str(value).strip():
            raise RowError("the label is empty", "Write the name of a class.")
        return str(value)
    if isinstance(value, list) and all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in value):
        return tuple(sorted({str(one) for one in value}))
    raise RowError(f"the label is {value!r:.60}", "Write a class's name, a number, or a list of names.")


def labels_in(examples: Examples, asked: str | None) -> Labels:
    """The labels of training rows. Numbers with a point make a regression, lists one of several labels.

    Args:
        examples: Their payloads have a `label`.
        asked: The problem's type, where the config names it.

    Raises:
        InputError: the rows do not agree on what a label is (also where words are mixed with whole numbers, unless the
            problem's type is asked for), or they show one class alone.
    """
    found = [examples.payload(index).label for index in range(len(examples))]
    kinds = Counter(map(_kind, found))
    kind = asked or kinds.most_common(1)[0][0]
    if asked is None and len(kinds) > 1:
        other = next(at for at, one in enumerate(found) if _kind(one) != kind)
        raise InputError(
            f"the label is {found[other]!r}, and most make this a {kind}",
            where=place_of(examples, other),
            fix="Mend the row, or set model.problem_type.",
        )
    if kind == REGRESSION:
        return Labels(REGRESSION, ())
    if asked is None and kind == SINGLE:
        _refuse_mixture(examples, list(map(str, found)))
    names = {name for one in found for name in (one if isinstance(one, tuple) else (one,))}
    if (len(names) < 2 and kind == SINGLE) or not names:
        raise InputError(
            f"all rows have the label {next(iter(names), 'none')!r}; there is nothing to tell apart",
            where=examples.rows.name,
            fix="Add rows of other classes.",
        )
    return named(kind, set(map(str, names)))


def _refuse_mixture(examples: Examples, names: list[str]) -> None:
    """Raises InputError where some classes are whole numbers and others words: 1 and "one" were two."""
    numbered = [_is_whole(name) for name in names]
    if all(numbered) or not any(numbered):
        return
    most = 2 * sum(numbered) >= len(names)
    other = numbered.index(not most)
    usual = names[numbered.index(most)]
    raise InputError(
        f"the label is {names[other]!r}, and most are {'whole numbers' if most else 'names'} such as {usual!r}",
        where=place_of(examples, other),
        fix=f"Mend the row; where both are meant as classes, set model.problem_type: {SINGLE}.",
    )


def named(kind: str, names: set[str]) -> Labels:
    """Labels in their order: whole numbers by their size, then names."""
    return Labels(kind, tuple(sorted(names, key=_order)))


def as_kind(label: Label, asked: str | None) -> Label:
    """The label as the config's problem type wants it.

    Raises:
        RowError: it cannot be one of that type.
    """
    if asked == REGRESSION and isinstance(label, str):
        try:
            return float(label)
        except ValueError:
            raise RowError(
                f"the label {label!r} is no number", "Mend the row, or leave model.problem_type out."
            ) from None
    if asked is not None and _kind(label) != asked:
        raise RowError(f"the label is {label!r}, and model.problem_type is {asked}", "Mend the one or the other.")
    return label


def place_of(examples: Examples, index: int) -> str:
    """File and line of an example."""
    return examples.rows.where(int(examples.table.example_rows[examples.order[index]]))


def shown(label: Label) -> str:
    """As a person reads it."""
    if isinstance(label, tuple):
        return ", ".join(label) or "(none)"
    return f"{label:g}" if isinstance(label, float) else label


def _kind(label: Label) -> str:
    return MULTI if isinstance(label, tuple) else REGRESSION if isinstance(label, float) else SINGLE


def _order(name: str) -> tuple[int, str]:
    """Whole numbers by their size, then names."""
    return (int(name), "") if _is_whole(name) else (10**18, name)


def _is_whole(name: str) -> bool:
    number = name.removeprefix("-")
    return number.isdecimal() and number.isascii()
