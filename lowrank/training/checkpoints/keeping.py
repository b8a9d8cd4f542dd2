"""When a run writes a checkpoint, and which of them stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a run does with its checkpoints.

    Attributes:
        newest: So many of the newest stay; the best one stays besides, where one is sought.
        steps: One is written after every so many steps.
        minutes: And when so many minutes have gone by since the last one. With neither, only where the run is stopped.
    """

    newest: int
    steps: int | None = None
    minutes: float | None = None

    def due(self, step: int, minutes: float, *, last: bool, best: int | None) -> bool:
        """Whether one is written now.

        Args:
            step: That has been taken.
            minutes: Since the last one was written.
            last: Whether it is the run's last.
            best: After which step the best evaluation was so far.
        """
        by_steps = self.steps is not None and step % self.steps == 0
        by_time = self.minutes is not None and minutes >= self.minutes
        at_the_end = last and (self.steps is not None or self.minutes is not None)
        return by_steps or by_time or at_the_end or best == step

    def dropped(self, steps: Sequence[int], best: int | None) -> list[int]:
        """Of the checkpoints that lie there, by their steps, the newest last: those that do not stay."""
        return [step for step in steps[: -self.newest] if step != best]

    def most(self, total_steps: int, evaluations: int | None) -> int:
        """How many lie there at one time, at most: those that stay, and the one that is being written.

        Args:
            total_steps: Of the run.
            evaluations: Where the best one is sought: the steps between two of them.
        """
        most = self.newest + (evaluations is not None) + 1
        if self.minutes is not None:
            return most
        written = sum(-(-total_steps // every) for every in (self.steps, evaluations) if every is not None)
        return min(most, max(written, 1))  # one where the run is stopped
