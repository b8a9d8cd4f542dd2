"""The moments of a run around its loop: how it begins, what the base is worth, what is saved, what has come of it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from lowrank.adapters import describe, disabled
from lowrank.config import RunConfig, dump_config
from lowrank.config.loading import CONFIG
from lowrank.recipes.parts.followers import Followers
from lowrank.recipes.parts.result import save_result
from lowrank.recipes.parts.resume import refuse_another_schedule
from lowrank.recipes.parts.setup import Setup
from lowrank.storage.whole_file import write_whole
from lowrank.training.callbacks.metrics_file import FILE as METRICS
from lowrank.training.callbacks.signals import saving
from lowrank.training.checkpoints.snapshot import restore
from lowrank.training.checkpoints.state import read_state
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.machine.ranks import Ranks
from lowrank.training.run import Callback, Run


def begin(run: Run, config: RunConfig, checkpoint: Path | None, ranks: Ranks) -> None:
    """Takes up a checkpoint, or makes the output folder."""
    if ranks.index > 0:  # dropout is another one in each process; adapters began alike
        torch.manual_seed(config.training.seed + ranks.index)
    if checkpoint is not None:
        state = read_state(checkpoint)
        refuse_another_schedule(config.training, config.adapter, state["total_steps"], run.total_steps, state["step"])
        restore(run, state, ranks)
    if ranks.main:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            (run.output_dir / METRICS).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        write_whole(run.output_dir / CONFIG, dump_config(config))
    ranks.wait()


def evaluate_the_base(run: Run, followers: Followers, *, goes_on: bool = False) -> None:
    """What the result is compared with: the base alone, or the adapter that training goes on from."""
    if followers.evaluate is not None:
        with disabled(run.model) if describe(run.model) and not goes_on else nullcontext():
            run.before = followers.evaluate()
        run.tell(Callback.on_eval, run.before)


def save_run(run: Run, setup: Setup, followers: Followers, format: str | None, ranks: Ranks) -> None:
    """What was learned; of a run that was interrupted also a checkpoint to go on from."""
    with saving(run):
        if run.interrupted:
            followers.checkpoints.write(run)
        if ranks.main:
            save_result(run, setup, format)
        run.tell(Callback.on_save, run.output_dir)


def evaluate_the_result(run: Run, followers: Followers) -> Evaluation | None:
    """None where the config names nothing to evaluate on, or the run was interrupted."""
    if followers.evaluate is None or run.interrupted:
        return None
    after = followers.evaluate()
    run.tell(Callback.on_eval, after)
    return after
