"""Everything that a run would do, short of training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lowrank.config import RunConfig, load_config
from lowrank.errors import InputError
from lowrank.recipes.resume import refuse_a_run_in
from lowrank.recipes.setup import set_up
from lowrank.recipes.show import open_console, plan_of, show_plan
from lowrank.training.estimate import MemoryEstimate, estimate_memory

SPARE_DISK = 64 * 2**20  # metrics, report, config


def check(config: RunConfig | str | Path, overrides: Sequence[str] = ()) -> MemoryEstimate:
    """Checks config, files, rows, model, targets, attention, disk space; runs the largest batch forward once.

    Args:
        config: A config, or the path of one.
        overrides: `section.key=value`, for a path.

    Returns:
        What the run will need at its peak.

    Raises:
        InputError: whatever would stop the run.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    output = Path(config.training.output_dir)
    refuse_a_run_in(output)
    console = open_console()
    setup = set_up(config)
    model = setup.model
    memory = estimate_memory(model, setup.loss, setup.plan.largest())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    free = refuse_a_full_disk(output, trained + SPARE_DISK)
    show_plan(
        console,
        {
            **plan_of(config, model, setup.attention, setup.loss, setup.plan, setup.size, setup.length),
            **_needs(memory, trained, free),
        },
    )
    console.print("the run can start", highlight=False)
    return memory


def refuse_a_full_disk(output: Path, needed: int) -> int:
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
        "weights": memory.weights,
        "gradients and optimiser": memory.training,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    told = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    return {
        "memory": f"about {memory.total / 2**20:,.0f} MiB at the peak of a step, beside the program itself ({told})",
        "disk": f"{written / 2**20:,.0f} MiB for the result, {free / 2**30:,.1f} GiB free",
    }
