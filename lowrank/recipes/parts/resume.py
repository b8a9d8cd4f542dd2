"""Going on with a run: the same config, and the newest whole checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters import METHODS
from lowrank.config import RunConfig, load_config
from lowrank.config.loading import CONFIG
from lowrank.config.sections import AdapterSection, OnResume, TrainingSection
from lowrank.errors import InputError
from lowrank.recipes.parts.optimisation import schedule_for
from lowrank.storage.lock import FILE as LOCK
from lowrank.storage.lock import held, holder
from lowrank.storage.whole_file import unfinished
from lowrank.training.checkpoints.writer import checkpoints_in, step_of
from lowrank.training.machine.ranks import Ranks

JUDGED = ("load_best_model_at_end", "early_stopping_patience")
"""Of the training section: with these, evaluations decide what comes out."""


def refuse_a_run_in(output: Path) -> None:
    """Raises InputError where a run, or anything else, is in the output folder already."""
    left = {unfinished(output / CONFIG), output / LOCK}  # by a run that died as it began
    if os.path.exists(output) and (not output.is_dir() or any(path not in left for path in _contents(output))):
        going_on = (output / CONFIG).exists()
        raise InputError(
            f"{output} holds {'a run' if going_on else 'something'} already; nothing in it was changed",
            where="training.output_dir",
            fix="Give another folder (--set training.output_dir=...), or move that one away."
            + (" To go on with the run, add --resume." if going_on else ""),
        )


def _contents(output: Path) -> list[Path]:
    """What is in the output folder."""
    try:
        return list(output.iterdir())
    except OSError as error:
        raise InputError(f"{output} cannot be read: {error.strerror}", where="training.output_dir") from error


@contextmanager
def own_folder(config: RunConfig, output: Path, ranks: Ranks, *, resume: bool) -> Iterator[Path | None]:
    """The output folder for this run alone, while it lasts.

    Args:
        config: Of the run.
        output: Its folder; made where it is missing.
        ranks: The run's processes: the first holds the folder, for all.
        resume: Whether to go on with the run in it.

    Yields:
        The checkpoint to go on from, None for a run that begins.

    Raises:
        InputError: another run is at work in it, or holds it; on all processes.
    """

    def look() -> Path | None:
        return _checkpoint_to_resume(config, output) if resume else refuse_a_run_in(output)

    at_work = holder(output) is not None  # then that is what is told
    if not at_work:
        look()
    ranks.wait()
    with ExitStack() as stack:
        found: Path | InputError | None = None
        if ranks.main:
            try:
                stack.enter_context(held(output))
                found = look()  # another run may have come and gone
            except InputError as error:
                found = error
        found = ranks.first(found)
        if isinstance(found, InputError):
            raise found
        yield found


def _checkpoint_to_resume(config: RunConfig, output: Path) -> Path | None:
    """The newest checkpoint of the run in `output`; None where it was stopped before its first.

    Raises:
        InputError: there is no run, or its config differs in what decides about the numbers.
    """
    if not os.path.isfile(output / CONFIG):
        raise InputError(
            f"{output} holds no run to resume",
            where="training.output_dir",
            fix="Start it without --resume, or, if its folder was moved, give that: --set training.output_dir=...",
        )
    there = checkpoints_in(output)
    earlier = load_config(output / CONFIG)
    refuse_another_config(earlier, config, output)
    return there[-1] if there else None


def day_of(named: str | None, resumed: Path | None) -> str | None:
    """The date that the run's chat template writes: the one that its config names, that on which it began, or today's.

    Args:
        named: By the config.
        resumed: The folder of the run that is resumed.
    """
    if named is not None:
        return named
    if resumed is not None and os.path.isfile(resumed / CONFIG):
        return load_config(resumed / CONFIG).data.date
    return str(date.today())


def on_day(config: RunConfig, day: str | None) -> RunConfig:
    """The config with that date."""
    return config.model_copy(update={"data": config.data.model_copy(update={"date": day})})


def refuse_another_config(earlier: RunConfig, now: RunConfig, output: Path) -> None:
    """Raises InputError with the differences, if any matters."""
    free = _free_keys(now)
    changed = [line for key, line in _differences(earlier, now).items() if key not in free]
    if changed:
        raise InputError(
            "the config is not the one that the run was started with:\n  " + "\n  ".join(changed),
            where=str(output / CONFIG),
            fix=f"Resume with that one (lowrank train {output / CONFIG} --resume), or start anew in another folder.",
        )


def _free_keys(config: RunConfig) -> set[str]:
    """What ("section.key") may be another when this run is resumed: the fields that are marked so."""
    judged = any(getattr(config.training, name) for name in JUDGED)
    marks = {OnResume.FREE} if judged else {OnResume.FREE, OnResume.FREE_UNLESS_JUDGED}
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    return {
        f"{name}.{key}"
        for name, section in sections.items()
        if section is not None
        for key, field in type(section).model_fields.items()
        if not marks.isdisjoint(mark for mark in field.metadata if isinstance(mark, OnResume))
    }


def refuse_another_schedule(
    training: TrainingSection, adapter: AdapterSection, was_total: int, is_total: int, step: int
) -> None:
    """Raises InputError where a new number of steps would have changed the learning rates or the ranks so far."""
    method = METHODS.get(adapter.method)
    if was_total != is_total and method is not None and method.spans_run:
        raise InputError(
            f"the run was planned for {was_total} steps and is now to take {is_total}; {method.spans_run}",
            where="adapter.method",
            fix="Keep the number of steps, or start anew.",
        )
    before, now = (_factors(training, total, step) for total in (was_total, is_total))
    if before != now:
        raise InputError(
            f"the run was planned for {was_total} steps and is now to take {is_total}; with the "
            f"{training.lr_scheduler_type} schedule its {step} steps so far would have had other learning rates",
            where="training.lr_scheduler_type",
            fix="Keep the number of steps, or start anew; a constant schedule with warmup_steps can be prolonged.",
        )


def _factors(training: TrainingSection, total_steps: int, count: int) -> list[float]:
    """The first learning rates of a run of so many steps, the highest counted as 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = schedule_for(training, optimizer, total_steps).lr_lambdas[0]
    return [float(factor(step)) for step in range(count)]


def _differences(earlier: RunConfig, now: RunConfig) -> dict[str, str]:
    """What differs, key by key: "training.seed: 42, now 7"."""
    before, after = flat(earlier.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return {
        key: f"{key}: {json.dumps(before.get(key))}, now {json.dumps(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def describe_start(checkpoint: Path | None, output: Path) -> str:
    """Where the run goes on."""
    if checkpoint is None:
        return f"{output} has no checkpoint yet: the run begins again"
    return f"resuming after step {step_of(checkpoint)} from {checkpoint}"
