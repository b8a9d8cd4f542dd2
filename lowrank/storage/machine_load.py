"""How many cores other programs keep busy: threads that share a core wait for one another, and spin while they do."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil
import torch

_MOMENT = 0.1  # seconds; the kernel counts in hundredths


@dataclass(frozen=True)
class Load:
    """A machine, as other programs leave it to this process.

    Attributes:
        cores: That this process may use.
        busy: How many of them others keep busy, in the mean.
        threads: That this process computes with.
    """

    cores: int
    busy: float
    threads: int

    @property
    def crowded(self) -> bool:
        """Whether threads of this process share cores with others."""
        return self.threads + round(self.busy) > self.cores

    @property
    def advice(self) -> str | None:
        """What to do about it, where fewer threads would have cores for themselves."""
        free = max(1, self.cores - round(self.busy))
        if not self.crowded or free >= self.threads:
            return None
        return (
            f"shared: other programs keep {self.busy:.1f} of {self.cores} cores busy, and this run computes with "
            f"{self.threads} threads, which would wait for one another; start it with OMP_NUM_THREADS={free}"
        )


@dataclass(frozen=True)
class Usage:
    """Seconds of processors since the machine began.

    Attributes:
        at: When it was looked at.
        all: Used by all programs on the cores of this process.
        own: Used by this process.
    """

    at: float
    all: float
    own: float


def usage_now() -> Usage:
    """Where `load_since` counts from."""
    own, each = psutil.Process().cpu_times(), psutil.cpu_times(percpu=True)
    used = [sum(getattr(each[core], kind, 0.0) for kind in _KINDS) for core in _cores() if core < len(each)]
    return Usage(time.monotonic(), sum(used), own.user + own.system)


# Of psutil's times; a guest's are counted as the user's too, and steal is what another machine on the host took.
_KINDS = ("user", "nice", "system", "irq", "softirq", "steal")


def load_since(began: Usage) -> Load:
    """What others have used since a moment, which a tenth of a second is waited for at least."""
    time.sleep(max(0.0, began.at + _MOMENT - time.monotonic()))
    now = usage_now()
    others = (now.all - began.all) - (now.own - began.own)
    return Load(len(_cores()), max(0.0, others / (now.at - began.at)), torch.get_num_threads())


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
