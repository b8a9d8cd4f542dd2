"""Everything that a run would do, short of training."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters import describe
from lowrank.config import RunConfig, load_config
from lowrank.config.sections import TrainingSection
from lowrank.errors import InputError, JobError
from lowrank.recipes.parts.followers import keeping_of
from lowrank.recipes.parts.less_memory import less_to_load, less_to_train
from lowrank.recipes.parts.memory_trial import estimate_memory
from lowrank.recipes.parts.reference import with_pretended_reference
from lowrank.recipes.parts.resume import refuse_a_run_in
from lowrank.recipes.parts.setup import own_device, set_up
from lowrank.recipes.parts.show import open_console, plan_of, show_line, show_plan
from lowrank.recipes.parts.starting import with_start
from lowrank.recipes.parts.task_setup import set_up_task
from lowrank.recipes.parts.tasked import with_task
from lowrank.storage.lock import held
from lowrank.training.callbacks.trackers import chosen_trackers
from lowrank.training.estimate import ADAM_BYTES, MemoryEstimate
from lowrank.training.machine.determinism import deterministic_kernels
from lowrank.training.machine.joining import refuse_half_a_launch
from lowrank.training.machine.launch import refuse_launcher_options
from lowrank.training.machine.memory import few_kernels_kept, forget_peak, resident_bytes
from lowrank.training.machine.ranks import Ranks
from lowrank.training.machine.shortage import told_when_short

SPARE_DISK = 64 * 2**20  # metrics, report, config


def check(config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> MemoryEstimate:
    """Checks config, files, rows, model, targets, attention, optimiser, trackers, disk space; takes a few steps on
    the largest batches and measures the memory. All in one process, for a run of any number; a base that the run shards
    is whole here.

    Args:
        config: A config, its sections as a mapping, or the path of one.
        overrides: `section.key=value`, for a mapping or a path.

    Returns:
        What the run will need at its peak, in a process that holds no more than this one before.

    Raises:
        InputError: whatever would stop the run.
    """
    command = _command(config, overrides) if isinstance(config, str | Path) else None
    config = with_task(with_start(config if isinstance(config, RunConfig) else load_config(config, overrides)))
    refuse_launcher_options(fsdp=config.training.fsdp)
    refuse_half_a_launch()
    few_kernels_kept()
    with deterministic_kernels(config.training.deterministic):
        return _check(config, command)


def _check(config: RunConfig, command: str | None) -> MemoryEstimate:
    device = own_device(config.model.device, config.training.num_processes or 1)
    forget_peak(device)
    program = resident_bytes()
    output = Path(config.training.output_dir)
    there = _said_by(refuse_a_run_in, output)
    if there is None:
        with held(output):
            pass  # it can be made and written to
    chosen_trackers(config.training.report_to)
    console = open_console()
    whole = config.model_copy(update={"training": config.training.model_copy(update={"fsdp": False})})
    with _refused_when_short(device, "loading the model and its data", less_to_load(config)):
        setting_up = set_up_task if config.tasked else set_up
        setup = setting_up(whole, device, Ranks(count=config.training.num_processes or 1))
    setup = with_pretended_reference(setup)
    model = setup.model
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    tokenizer = len(setup.tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    with_adapter = bool(describe(model))
    written = _written_bytes(config.training, trained, setup.length.steps, tokenizer, with_adapter=with_adapter)
    free = _refuse_a_full_disk(output, written + SPARE_DISK)
    plan = plan_of(config, setup)
    with _refused_when_short(device, "trying the longest batch", less_to_train(config)):
        memory = estimate_memory(whole.model, whole.training, setup, program)
    show_plan(console, {**plan, **_needs(memory, written, free)})
    if there is not None:
        raise there  # told last: all else has been looked at
    show_line(console, "the run can start" if command is None else f"the run can start: {command}")
    return memory


def _command(path: str | Path, overrides: Sequence[str]) -> str:
    return shlex.join(["lowrank", "train", str(path), *(part for one in overrides for part in ("--set", one))])


def _said_by(refuse: Callable[[Path], object], path: Path) -> InputError | None:
    try:
        refuse(path)
    except InputError as error:
        return error
    return None


@contextmanager
def _refused_when_short(device: torch.device, doing: str, less: Sequence[str]) -> Iterator[None]:
    """Where a run would fail for want of memory, its config asks for too much."""
    try:
        with told_when_short(device, doing, less):
            yield
    except JobError as error:
        raise InputError(error.what, where=error.where, fix=error.fix) from error


def _written_bytes(training: TrainingSection, trained: int, steps: int, tokenizer: int, *, with_adapter: bool) -> int:
    """The most that result and checkpoints take at one time.

    Args:
        training: How often checkpoints are written, and how many stay.
        trained: Bytes of what trains.
        steps: Of the whole run.
        tokenizer: Bytes of the tokenizer, which lies beside every adapter.
        with_adapter: Whether a checkpoint holds the adapter as people use it, beside what training needs to go on.
    """
    most = keeping_of(training).most(steps, training.eval_steps if training.load_best_model_at_end else None)
    adapters = (trained + tokenizer) * (1 + most * with_adapter)
    return adapters + trained * most * (1 + ADAM_BYTES)


def _refuse_a_full_disk(output: Path, needed: int) -> int:
    """The free bytes where the output goes. Raises InputError where they are fewer than needed."""
    place = next(folder for folder in [output.absolute(), *output.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place} has {free / 2**20:.0f} MiB free, and the run writes about {needed / 2**20:.0f} MiB",
            where="training.output_dir",
            fix="Make room, or give a folder on another disk.",
        )
    return free


def _needs(memory: MemoryEstimate, written: int, free: int) -> dict[str, str]:
    parts = {
        "the program": memory.program,
        "weights": memory.weights,
        "gradients and optimiser": memory.training,
        "activations and all else": memory.rest,
        **memory.beside,
    }
    told = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items() if size)
    return {
        "memory": f"about {memory.total / 2**20:,.0f} MiB at the peak, from trying a few steps ({told})",
        "disk": f"up to {written / 2**20:,.0f} MiB for result and checkpoints, {free / 2**30:,.1f} GiB free",
    }
