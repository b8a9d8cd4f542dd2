"""Several runs over one base and one reading of the rows, side by side; each leaves the folder that it leaves alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress

from lowrank.adapters import using
from lowrank.config import RunConfig
from lowrank.config.loading import CONFIG
from lowrank.config.sections import TrainingSection
from lowrank.errors import JobError
from lowrank.recipes.parts.beginning import joined_accelerator, launched_device, try_the_longest
from lowrank.recipes.parts.course import begin, evaluate_the_base, evaluate_the_result, save_run
from lowrank.recipes.parts.followers import Followers, followers_of, keeping_of, trackers_of
from lowrank.recipes.parts.less_memory import less_to_load, less_to_train
from lowrank.recipes.parts.members import one_more, run_of, why_apart
from lowrank.recipes.parts.products import begun_in, computing_in
from lowrank.recipes.parts.result import RunResult, try_to_write_card
from lowrank.recipes.parts.resume import day_of, flat, on_day, own_folder
from lowrank.recipes.parts.setup import Setup, set_up
from lowrank.recipes.parts.show import plan_of, show_line, show_plan
from lowrank.training.callbacks.progress import Screen, bars_on
from lowrank.training.callbacks.signals import stopping_softly
from lowrank.training.checkpoints.keeping import Keeping
from lowrank.training.checkpoints.state import read_state
from lowrank.training.checkpoints.writer import checkpoints_in, step_of
from lowrank.training.losses.supervised import HiddenLoss
from lowrank.training.machine.determinism import deterministic_kernels
from lowrank.training.machine.memory import few_kernels_kept, freed_blocks_kept
from lowrank.training.machine.ranks import ALONE
from lowrank.training.machine.shortage import told_when_short
from lowrank.training.run import Callback, Run
from lowrank.training.side_by_side import Member, fit_together


class ApartError(Exception):
    """This model's runs cannot go through it together; nothing has been written."""


@dataclass(frozen=True)
class _One:
    """One of the runs, ready to begin.

    Attributes:
        name: Of its folder.
        config: With the day.
        setup: Its own plan, on the model of all.
        run: Its state.
        member: What trains it.
        followers: Who is told.
        summary: Of its plan.
    """

    name: str
    config: RunConfig
    setup: Setup
    run: Run
    member: Member
    followers: Followers
    summary: Mapping[str, str]


def train_together(
    configs: Mapping[str, RunConfig],
    console: Console,
    *,
    resume: bool,
    on_result: Callable[[str, RunResult, JobError | None], None],
) -> bool:
    """Trains runs that are alike in what `members.in_common` compares.

    Args:
        configs: By the names of their folders.
        console: What is shown goes there.
        resume: Go on from the newest step of which all have a checkpoint.
        on_result: Told of each run as it ends, and of why it was given up.

    Returns:
        Whether a signal ended them before their end.

    Raises:
        ApartError: this model's runs cannot go through it together.
        InputError: something in the config, the model or the data cannot be used.
        JobError: there is not enough memory, or a folder cannot be written.
    """
    few_kernels_kept()
    first = next(iter(configs.values()))
    with deterministic_kernels(first.training.deterministic), ExitStack() as stack:
        checkpoints = _checkpoints(configs) if resume else {}
        for name, config in configs.items():
            stack.enter_context(own_folder(config, _folder(config.training), ALONE, resume=name in checkpoints))
        if checkpoints:
            show_line(console, f"resuming {len(configs)} runs after step {max(map(step_of, checkpoints.values()))}")
        bars = stack.enter_context(bars_on(console))
        ones = _prepared(configs, checkpoints, console, bars)
        return _train(ones, console, on_result)


def _folder(training: TrainingSection) -> Path:
    return Path(training.output_dir)


def _checkpoints(configs: Mapping[str, RunConfig]) -> dict[str, Path]:
    """Each run's checkpoint of the newest step of which all have one, or their last; later ones go. Where there is no
    such step, all begin again, and what they have written goes."""
    there = {
        name: {step_of(path): path for path in checkpoints_in(_folder(one.training))} for name, one in configs.items()
    }
    ended = {name: _total(found) for name, found in there.items()}
    steps = sorted({step for found in there.values() for step in found}, reverse=True)
    for step in steps:
        chosen = {name: found.get(min(step, ended[name] or step)) for name, found in there.items()}
        if all(path is not None for path in chosen.values()):
            for found in there.values():
                for later in [path for at, path in found.items() if at > step]:
                    shutil.rmtree(later)
            return {name: path for name, path in chosen.items() if path is not None}
    for config in configs.values():
        if os.path.isfile(_folder(config.training) / CONFIG):
            shutil.rmtree(_folder(config.training))
    return {}


def _total(found: Mapping[int, Path]) -> int | None:
    """The steps of the whole run, from its newest checkpoint."""
    return read_state(found[max(found)])["total_steps"] if found else None


def _prepared(
    configs: Mapping[str, RunConfig], checkpoints: Mapping[str, Path], console: Console, bars: Progress
) -> list[_One]:
    """The model loaded, the rows read, each run's adapter put in as it would be alone."""
    found: list[_One] = []
    setup: Setup | None = None
    for number, (name, config) in enumerate(configs.items()):
        output, adapter = _folder(config.training), f"run{number}" if number else Run.adapter
        resumed = output if name in checkpoints else None
        given = begun_in(config, resumed)
        config = on_day(given, day_of(given.data.date, resumed))
        device = launched_device(config.training, config.model.device)
        accelerator = joined_accelerator(config.training, device)
        if setup is None:
            set_seed(config.training.seed)
            with told_when_short(device, "loading the model and its data", less_to_load(config)):
                setup = mine = set_up(config, device)
            if (why := why_apart(setup)) is not None:
                raise ApartError(why)
        else:
            mine = one_more(setup, config, adapter)
        run = run_of(config.training, mine, adapter)
        summary = plan_of(config, mine, adapter)
        if not number:
            show_plan(console, summary)
            with told_when_short(device, "trying the longest batch", less_to_train(config)):
                if remark := try_the_longest(mine, accelerator, config.model.name_or_path):
                    show_line(console, f"warning: {remark}")
        training = config.training
        trackers = trackers_of(accelerator, output, flat(config.model_dump(mode="json")), console)
        screen = Screen(console, training.logging_steps, name, bars)
        acting = partial(using, mine.model, adapter)
        keeping = _kept_together(keeping_of(training))
        followers = followers_of(
            training, mine, run, console, summary, ALONE, trackers, screen=screen, acting=acting, keeping=keeping
        )
        run.callbacks = followers.callbacks
        begin(run, computing_in(config if mine.writes_date else given, mine.products), checkpoints.get(name), ALONE)
        member = Member(run, mine.plan, mine.size, training.max_grad_norm, training.max_skipped_steps)
        found.append(_One(name, config, mine, run, member, followers, summary))
    for one in found:
        for parameter in one.member.parameters:
            parameter.requires_grad_(True)
    return found


def _kept_together(keeping: Keeping) -> Keeping:
    """One more stays, so that a step of which all have a checkpoint is there at any moment. When minutes have gone by
    is for all of them to say at once (`_Clock`)."""
    return Keeping(keeping.newest + 1, keeping.steps, None if keeping.minutes is None else float("inf"))


class _Clock:
    """Has all runs that go on write a checkpoint after the same step, when so many minutes have gone by."""

    def __init__(self, ones: Sequence[_One], console: Console) -> None:
        self.ones, self.console = ones, console
        self.minutes = ones[0].config.training.save_minutes
        self._written = time.monotonic()

    def __call__(self) -> None:
        """After each step of all."""
        if self.minutes is None or time.monotonic() - self._written < 60 * self.minutes:
            return
        self._written = time.monotonic()
        for one in self.ones:
            if one.member.goes_on:
                try:
                    one.followers.checkpoints.write(one.run)
                except JobError as error:
                    show_line(self.console, f"warning: {one.name}: no checkpoint after step {one.run.step}: {error}")


def _train(
    ones: Sequence[_One], console: Console, on_result: Callable[[str, RunResult, JobError | None], None]
) -> bool:
    """The loop; whether a signal ended it."""
    lead = ones[0]
    device = torch.device(lead.setup.model.device)
    loss = lead.setup.loss
    assert isinstance(loss, HiddenLoss), "why_apart has looked"
    with ExitStack() as stack, told_when_short(device, "training", less_to_train(lead.config)):
        for one in ones:
            stack.enter_context(one.run.underway())
        _evaluate_the_base_once(ones)

        ended: list[Member] = []

        def end(member: Member) -> None:
            ended.append(member)
            one = next(one for one in ones if one.member is member)
            on_result(one.name, _ended(one, console), member.lost)

        with stopping_softly(lead.run), freed_blocks_kept():
            fit_together(
                [one.member for one in ones],
                loss,
                accelerator=joined_accelerator(lead.config.training, device),
                asked_to_end=lambda: lead.run.interrupted,
                on_end=end,
                on_round=_Clock(ones, console),
            )
        interrupted = any(one.run.interrupted and one.member not in ended for one in ones)
        for one in ones:
            if interrupted and one.member not in ended:
                on_result(one.name, _ended(one, console), None)
    if not interrupted:
        _drop_the_one_more(ones)
    return interrupted


def _evaluate_the_base_once(ones: Sequence[_One]) -> None:
    """The rows are the same for all, and so is the base."""
    new = [one for one in ones if one.run.step == 0 and one.config.training.eval_on_start]
    if not new:
        return
    evaluate_the_base(new[0].run, new[0].followers)
    for one in new[1:]:
        one.run.before = new[0].run.before
        if one.run.before is not None:
            one.run.tell(Callback.on_eval, one.run.before)


def _ended(one: _One, console: Console) -> RunResult:
    """What a run leaves that has taken its last step, or was stopped."""
    run, output = one.run, one.run.output_dir
    if one.member.lost is not None:
        show_line(console, f"{one.name}: given up: {one.member.lost}")
        return RunResult(output, run.step, False, run.before, None)
    run.model.eval()
    save_run(run, one.setup, one.followers, one.config.data.format, ALONE)
    after = evaluate_the_result(run, one.followers)
    if remark := try_to_write_card(one.config, one.summary, one.setup, run, after):
        show_line(console, remark)
    return RunResult(output, run.step, run.interrupted, run.before, after)


def _drop_the_one_more(ones: Sequence[_One]) -> None:
    """Of checkpoints stay as many as the config says."""
    for one in ones:
        there = {step_of(path): path for path in checkpoints_in(one.run.output_dir)}
        for step in keeping_of(one.config.training).dropped(list(there), None):
            shutil.rmtree(there[step])
