"""Runs of `lowrank` in processes of their own: several on one run, or one that dies where a test wants it to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

# Read by the fork server's interpreter. The same number as here: with another one sums may differ in their last bit.
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, not once a run
CONTEXT.set_forkserver_preload(["lowrank.recipes.train", "lowrank.cli.app", "transformers.models.llama"])


def start(
    folder: Path,
    arguments: list[str],
    dies: tuple[str, int] | None = None,
    environment: dict[str, str] | None = None,
    workers: bool = False,
) -> BaseProcess:
    """`lowrank` with these arguments, in `folder`; output goes to `out.txt` there.

    Args:
        folder: The working folder.
        arguments: Of the command.
        dies: A moment ("step", "eval", "save", "rename" or "whole") and how many are lived to see before SIGKILL.
        environment: Variables of the process.
        workers: Rows are tokenised in processes of their own, as those of larger data are.
    """
    process = CONTEXT.Process(target=_run, args=(str(folder), arguments, dies, environment or {}, workers))
    process.start()
    return process


def start_ranks(folder: Path, arguments: list[str], count: int) -> list[BaseProcess]:
    """The same in `count` processes that train together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        start(folder, arguments, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def _run(
    folder: str, arguments: list[str], dies: tuple[str, int] | None, environment: dict[str, str], workers: bool
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    if workers:
        import lowrank.data.loading.workers

        lowrank.data.loading.workers.WORTH_PROCESSES = 1
    if dies is not None:
        _arrange(*dies)
    with open("out.txt", "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        from lowrank.cli import main

        main(arguments)


def _arrange(moment: str, count: int) -> None:
    """Makes the process kill itself in the middle of the moment after `count` of them."""
    import lowrank.storage.whole_file as files
    import lowrank.training.checkpoints.writer as checkpoint
    import lowrank.training.evaluation.evaluation as evaluate
    import lowrank.training.loop as loop
    from lowrank.recipes.parts import assess
    from lowrank.storage import folders

    module, name = {
        "step": (loop, "_clip"),  # gradients are there, weights are as before
        "eval": (assess, "losses_of"),
        "save": (checkpoint, "write_state"),  # the adapter is written, the state is not
        "rename": (folders, "_sync_all"),  # all is written, under another name
        "whole": (files, "sync"),  # the config, the metrics so far, the report: written, not yet in their places
    }[moment]
    assert evaluate.losses_of is assess.losses_of
    whole, left = getattr(module, name), [count]

    def dying(*given: object, **named: object) -> object:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return whole(*given, **named)

    setattr(module, name, dying)
