"""A sweep: one config with several values of some keys, and which of them is the best."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank.config import RunConfig, dump_config
from lowrank.config.loading import CONFIG
from lowrank.config.sweeping import Combination, Sweep, read_sweep
from lowrank.errors import InputError, JobError
from lowrank.recipes.parts.members import in_common, why_alone
from lowrank.recipes.parts.result import RunResult
from lowrank.recipes.parts.show import open_console, show_line
from lowrank.recipes.parts.sweep_page import Outcome, recommendation, sorted_outcomes, write_page
from lowrank.recipes.parts.tasked import with_task
from lowrank.recipes.parts.train_together import ApartError, train_together
from lowrank.recipes.train import train
from lowrank.storage.folders import new_folder
from lowrank.storage.lock import FILE as LOCK
from lowrank.storage.lock import held
from lowrank.storage.whole_file import write_whole
from lowrank.training.checkpoints.writer import FOLDER

STATE, BEST_CONFIG, BEST = "sweep.json", "best.yaml", "best"
Noted = Callable[[str, RunResult, JobError | None], None]
TOGETHER = 32
"""Runs of a pass at most: each holds an adapter and its optimiser's state."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        output_dir: A folder for each run, the page, `best.yaml` and `best/`.
        outcomes: The best first.
        interrupted: Whether it was stopped before its end.
    """

    output_dir: Path
    outcomes: Sequence[Outcome]
    interrupted: bool


def sweep(config: str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> SweepResult:
    """Trains each combination of the values that the config's section `sweep` lists, and compares them.

    What can go through the model together does, over one base and one reading of the rows; each run's adapter is what
    `lowrank train` with its config gives.

    Args:
        config: The path of a config with a section `sweep`.
        overrides: `section.key=value`.
        resume: Go on with the sweep in `training.output_dir`.

    Raises:
        InputError: something in the config, the model or the data cannot be used, or the folder holds another sweep.
        JobError: a run failed.
    """
    planned = read_sweep(config, overrides)
    _refuse_what_cannot_be_compared(planned)
    output, console = planned.output_dir, open_console()
    with held(output):
        done = _taken_up(planned, resume)
        show_line(console, f"{len(planned.combinations)} runs in {output}")
        interrupted = _train_all(planned, done, console, resume)
        outcomes = sorted_outcomes(planned.combinations, done)
        write_page(output, planned.combinations, outcomes)
        if not interrupted:
            _keep_the_best(output, planned, outcomes)
    show_line(console, _farewell(output, outcomes, interrupted, _said(config, overrides)))
    return SweepResult(output, outcomes, interrupted)


def _refuse_what_cannot_be_compared(planned: Sweep) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a sweep is one process", fix="Start it with `lowrank sweep` alone.")
    if planned.combinations[0].config.data.eval is None:
        raise InputError(
            "a sweep compares runs on held-out rows, and the config names none",
            where="data.eval",
            fix="Name a file, or a part of the rows, such as data.eval: 0.1.",
        )


def _taken_up(planned: Sweep, resume: bool) -> dict[str, dict[str, Any]]:
    """The outcomes that are there already, by the names of their folders.

    Raises:
        InputError: the folder holds something, and it is not to be gone on with; or it is another sweep's.
    """
    output, file = planned.output_dir, planned.output_dir / STATE
    mine = {one.name: _plain(one.settings) for one in planned.combinations}
    if not resume:
        if any(path.name != LOCK for path in output.iterdir()):
            what = "a sweep" if file.exists() else "something"
            fix = "Give another folder (--set training.output_dir=...), or move that one away."
            fix += " To go on with the sweep, add --resume." if file.exists() else ""
            raise InputError(
                f"{output} holds {what} already; nothing in it was changed", where="training.output_dir", fix=fix
            )
        _write(output, mine, {})
        return {}
    if not file.exists():
        raise InputError(f"{output} holds no sweep to resume", where="training.output_dir", fix="Leave out --resume.")
    there = json.loads(file.read_text(encoding="utf-8"))
    if there["runs"] != mine:
        only = [name for name in (*mine, *there["runs"]) if (name in mine) != (name in there["runs"])]
        raise InputError(
            f"{output} holds another sweep: {', '.join(only[:3]) or 'its values'} is only in one of the two",
            where="training.output_dir",
            fix="Resume with that one's config, or give another folder.",
        )
    return there["outcomes"]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def _write(output: Path, runs: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    write_whole(output / STATE, json.dumps({"runs": runs, "outcomes": done}, indent=1))


def _train_all(planned: Sweep, done: dict[str, dict[str, Any]], console: Console, resume: bool) -> bool:
    """Trains what has not been; whether a signal ended it."""
    runs = {one.name: _plain(one.settings) for one in planned.combinations}

    def note(name: str, result: RunResult, lost: JobError | None) -> None:
        if result.interrupted:
            return
        after = result.after
        done[name] = {
            "steps": result.steps,
            "lost": None if lost is None else str(lost),
            "loss": None if after is None else after.loss,
            "exact_match": None if after is None else after.exact_match,
            "answers": 0 if after is None else len(after.samples),
        }
        _write(planned.output_dir, runs, done)

    for group in _groups(planned.combinations):
        if all(name in done for name in group):
            continue
        if _train_group(group, console, resume, note):
            return True
    return False


def _groups(combinations: Sequence[Combination]) -> list[dict[str, RunConfig]]:
    """Which runs go together; those that go alone come last."""
    alike: dict[str, dict[str, RunConfig]] = {}
    alone: list[dict[str, RunConfig]] = []
    for one in combinations:
        if why_alone(with_task(one.config)) is not None:
            alone.append({one.name: one.config})
        else:
            alike.setdefault(in_common(one.config), {})[one.name] = one.config
    found = []
    for group in alike.values():
        names = list(group)
        found += [{name: group[name] for name in names[at : at + TOGETHER]} for at in range(0, len(names), TOGETHER)]
    return [*found, *alone]


def _train_group(group: Mapping[str, RunConfig], console: Console, resume: bool, note: Noted) -> bool:
    if len(group) > 1:
        try:
            return train_together(group, console, resume=resume, on_result=note)
        except ApartError as why:
            show_line(console, f"the runs go one after another: {why}")
    for name, config in group.items():
        begun = resume and (Path(config.training.output_dir) / CONFIG).is_file()
        show_line(console, f"{name}: {why_alone(config) or 'nothing to share a pass with'}; it runs by itself")
        try:
            result = train(config, resume=begun)
        except JobError as error:
            note(name, RunResult(Path(config.training.output_dir), 0, False, None, None), error)
            continue
        note(name, result, None)
        if result.interrupted:
            return True
    return False


def _keep_the_best(output: Path, planned: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Its config, to train it again or for longer, and its folder without checkpoints."""
    best = outcomes[0]
    if best.loss is None:
        return
    config = next(one.config for one in planned.combinations if one.name == best.name)
    again = config.training.model_copy(update={"output_dir": f"{output}-{BEST}"})
    write_whole(output / BEST_CONFIG, dump_config(config.model_copy(update={"training": again})))
    if (output / BEST).exists():
        shutil.rmtree(output / BEST)
    with new_folder(output / BEST) as work:
        shutil.copytree(output / best.name, work, ignore=shutil.ignore_patterns(FOLDER, LOCK), dirs_exist_ok=True)


def _said(config: str | Path, overrides: Sequence[str]) -> str:
    """What the sweep was started with, as a shell takes it."""
    return shlex.join([str(config), *(part for one in overrides for part in ("--set", one))])


def _farewell(output: Path, outcomes: Sequence[Outcome], interrupted: bool, said: str) -> str:
    if interrupted:
        return f"stopped; what was learned is in {output}.\nTo go on: lowrank sweep {said} --resume"
    page = f"open {output / 'report.html'}"
    if outcomes[0].loss is None:
        return f"done: {output}; {page}. No run came to a result."
    told = recommendation(outcomes)
    return f"done: {output}; {page}.\n{told}\nTo go on: lowrank train {output / BEST_CONFIG}"
