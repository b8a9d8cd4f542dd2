"""The processes of a run find one another, or it is told why not.

A launcher describes each process to itself by five variables. Some of them may be left over in a shell from another
job: a run that then waited for processes that nobody starts would stand still for half an hour."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from lowrank.errors import InputError, first_line

_LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "KUBERNETES_SERVICE_HOST", *_MPI_SIZES)
"""Whoever sets one of these starts the other processes too, however long that takes; else a person does, or nobody."""

PATIENCE = timedelta(minutes=2)


def refuse_half_a_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Raises InputError where the launcher's variables are not numbers, not all there, or contradict one another."""
    for name in (*_NUMBERS, *_MPI_SIZES):
        if name in environment and not environment[name].isdecimal():
            raise InputError(f"{environment[name]!r} is no number", where=name, fix=_fix(environment))
    several = int(environment.get("WORLD_SIZE", 1)) > 1 or "LOCAL_RANK" in environment
    if not several or any(int(environment.get(name, 1)) > 1 for name in _MPI_SIZES):
        return
    missing = [name for name in _LAUNCH if name not in environment]
    if missing:
        there = ", ".join(f"{name}={environment[name]}" for name in _LAUNCH if name in environment)
        raise InputError(
            f"the variables say that a launcher has started this process, but not all of them are there: {there}, and "
            f"no {', '.join(missing)}",
            where=next(name for name in _LAUNCH if name in environment),
            fix=_fix(environment),
        )
    rank, count, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not local <= rank < count:
        told = f"RANK={rank}, LOCAL_RANK={local}, WORLD_SIZE={count}"
        raise InputError(f"the launcher's variables contradict one another: {told}", fix=_fix(environment))


def join(*, cuda: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes that a person has started by hand, where there are any; a launcher's own are left to it.

    Args:
        cuda: Whether they compute on NVIDIA's accelerators.
        environment: The variables, whole.

    Raises:
        InputError: they did not all come within `PATIENCE`.
    """
    by_hand = not any(name in environment for name in _LAUNCHERS)
    if "LOCAL_RANK" not in environment or not by_hand or dist.is_initialized():
        return
    rank, count, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    try:
        store = dist.TCPStore(environment["MASTER_ADDR"], port, count, rank == 0, timeout=PATIENCE)
        store.set_timeout(dist.constants.default_pg_timeout)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        raise not_joined(error, environment) from error


def not_joined(error: Exception, environment: Mapping[str, str] = os.environ) -> InputError:
    """What to say where the processes of a run did not find one another."""
    why = first_line(error)
    where = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    return InputError(
        f"{environment.get('WORLD_SIZE')} processes are to share this run, and they did not come "
        f"together at {where} ({why})",
        where="WORLD_SIZE",
        fix=_fix(environment),
    )


def _fix(environment: Mapping[str, str]) -> str:
    left = " ".join(name for name in (*_LAUNCH, "LOCAL_WORLD_SIZE", *_MPI_SIZES) if name in environment)
    return (
        f"For one process, `unset {left}` first: they are left over from another job. For several, start it with "
        "torchrun --nproc_per_node N -m lowrank train CONFIG."
    )
