"""The config of a run as a whole."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from lowrank.config.contradictions import ContradictionsError, contradictions
from lowrank.config.run_sections import RunSections


class RunConfig(RunSections):
    """What `lowrank train` is given. Relative paths are relative to the current folder, not to the config's."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        found = list(contradictions(self))
        if found:
            raise ContradictionsError(found)
        return self
