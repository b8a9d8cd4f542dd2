"""How rows become tokens: what can be asked for. The config reads the names here, so nothing loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
TooLong = Literal["error", "drop", "truncate", "split"]
BadRows = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Options:
    """How rows become tokens.

    Attributes:
        train_on: Which tokens carry loss.
        max_length: The most tokens in an example.
        too_long: `error` (the caller raises), `drop`, `truncate`, or `split`, which cuts plain text into pieces.
        bad_rows: `error` (the caller raises) or `skip`.
        today: The date (2026-11-26) for chat templates that write the day's; None: the day it is.
    """

    train_on: str
    max_length: int
    too_long: str
    bad_rows: str = "error"
    today: str | None = None

    def __post_init__(self) -> None:
        _check("train_on", self.train_on, TrainOn)
        _check("bad_rows", self.bad_rows, BadRows)
        _check("too_long", self.too_long, TooLong)
        assert self.max_length > 1, f"max_length is {self.max_length}"


def _check(name: str, value: str, known: Any) -> None:
    assert value in get_args(known), f"{name} is {value!r}, not one of {', '.join(get_args(known))}"
