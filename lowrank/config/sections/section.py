"""What all sections share: paths, counts of tokens, and which fields may be another when a run is resumed."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from lowrank.errors import InputError
from lowrank.paths import as_written, expanded


class Section(BaseModel):
    """A section of a run's config: its fields' docstrings are its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class OnResume(Enum):
    """A mark on a field: a run may be resumed with another value, for it cannot alter what is trained. A field without
    one must be as it was."""

    FREE = "free"
    """Nor can the run's length, where its schedule does not look ahead, nor how its steps' batches are shared out; of
    both a checkpoint is asked besides."""
    FREE_UNLESS_JUDGED = "free unless judged"
    """Not where evaluations decide what comes out: when the run ends, or which weights are taken."""


def _path(written: str) -> str:
    try:
        return expanded(written)
    except InputError as error:
        fix = f"; {error.fix[:1].lower()}{error.fix[1:].rstrip('.')}" if error.fix else ""
        raise ValueError(f"{error.what}{fix}") from None


PathText = Annotated[str, AfterValidator(_path), PlainSerializer(as_written, return_type=str, when_used="json")]
"""A file, a folder, or a name on the hub; `~` and `$NAME` are replaced when the config is read."""


def _countable(tokens: int) -> int:
    if tokens >= 2**31:
        raise ValueError(f"{tokens:.3g} tokens are more than can be counted; write a number below 2**31")
    return tokens


Tokens = Annotated[int, Field(ge=2), AfterValidator(_countable)]
