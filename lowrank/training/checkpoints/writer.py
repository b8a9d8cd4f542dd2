"""Checkpoints: `checkpoints/step-N` in a run's folder, each an adapter that can be used beside the run's whole state.

One is written under another name, synced, and renamed: it is complete or it is not there."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank.errors import JobError
from lowrank.storage.folders import new_folder
from lowrank.training.checkpoints.keeping import Keeping
from lowrank.training.checkpoints.snapshot import capture
from lowrank.training.checkpoints.state import write_state
from lowrank.training.evaluation.best import Best
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.machine.ranks import ALONE, Ranks
from lowrank.training.run import Callback, Run, StepMetrics

FOLDER = "checkpoints"
_PREFIX = "step-"
_RETRY_SECONDS = 60.0


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last."""
    found = (output_dir / FOLDER).glob(f"{_PREFIX}*")
    ours = (path for path in found if path.is_dir() and re.fullmatch(rf"{_PREFIX}\d+", path.name))
    return sorted(ours, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that it was taken after."""
    return int(checkpoint.name.removeprefix(_PREFIX))


class Checkpoints(Callback):
    """Writes checkpoints when they are due, and takes those away that do not stay.

    A checkpoint that cannot be written leaves the older ones as they are; training goes on, and it is tried again a
    minute later. `told` says so.
    """

    def __init__(
        self,
        save_weights: Callable[[Path], object],
        told: Callable[[str], object],
        keeping: Keeping,
        *,
        best: Best | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """When and what.

        Args:
            save_weights: Writes the adapter, as people use it, into a folder.
            told: Shows a person a line.
            keeping: When, and which stay.
            best: Tells which evaluation was the best so far, where that matters.
            ranks: The run's processes: all gather the state, the first writes it.
        """
        self.save_weights, self.told = save_weights, told
        self.keeping, self.best, self.ranks = keeping, best, ranks
        self._written = time.monotonic()
        self._retry_at = float("inf")
        self._best_before: dict[str, Any] = {}

    def on_run_start(self, run: Run) -> None:
        """Clears away what a death while one was written has left."""
        if self.ranks.main:
            for left in (run.output_dir / FOLDER).glob(f".{_PREFIX}*.incomplete-*"):
                shutil.rmtree(left)

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """Notes the best."""
        if self.best is not None and run.step > 0:
            before = self.best.state_dict()
            if self.best.note(run.step, evaluation):
                self._best_before = before

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """Writes one when it is due."""
        self._write_if_due(run)

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        """Writes one when it is due."""
        self._write_if_due(run)

    def write(self, run: Run) -> Path:
        """Writes one now.

        Raises:
            JobError: the disk is full or cannot be written, on all processes; what was there is as it was.
        """
        path = run.output_dir / FOLDER / f"{_PREFIX}{run.step}"
        state = capture(run, self.ranks)
        failure = self.ranks.first(self._written_by_main(run, path, state))
        if failure is not None:
            raise failure
        self._written, self._retry_at = time.monotonic(), float("inf")
        run.tell(Callback.on_save, path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {} if self.best is None else self.best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.best is not None:
            self.best.load_state_dict(state)

    def _write_if_due(self, run: Run) -> None:
        if not self.ranks.any(self.ranks.main and self._due(run)):
            return
        try:
            self.write(run)
        except JobError as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            if self.best is not None and self.best.step == run.step < run.total_steps and not run.stop:
                self.best.load_state_dict(self._best_before)  # the model moves on, and nobody has kept these weights
            self.told(_cannot_write(error, run))

    def _written_by_main(self, run: Run, path: Path, state: dict[str, Any]) -> JobError | None:
        """Why not, where it could not; the other processes know of nothing."""
        if not self.ranks.main:
            return None
        try:
            if not path.exists():
                with new_folder(path) as work:
                    self.save_weights(work)
                    write_state(work, state)
            self._drop_old(run)
        except JobError as error:
            return error
        except OSError as error:
            return JobError(f"{error}", where=str(path), fix="Make it writable and go on with --resume.")
        return None

    def _due(self, run: Run) -> bool:
        now, best = time.monotonic(), None if self.best is None else self.best.step
        due = self.keeping.due(run.step, (now - self._written) / 60, last=run.step == run.total_steps, best=best)
        return run.stop or due or now >= self._retry_at

    def _drop_old(self, run: Run) -> None:
        there = {step_of(path): path for path in checkpoints_in(run.output_dir)}
        for step in self.keeping.dropped(list(there), None if self.best is None else self.best.step):
            shutil.rmtree(there[step])


def _cannot_write(error: JobError, run: Run) -> str:
    there = checkpoints_in(run.output_dir)
    newest = f"{there[-1]} is the newest that is there" if there else "there is none yet"
    return (
        f"warning: no checkpoint after step {run.step}: {error}\n"
        f"         {newest}; training goes on, and it is tried again in a minute. Make room in {run.output_dir}."
    )
