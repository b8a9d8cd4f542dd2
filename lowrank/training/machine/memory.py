"""Memory on the CPU: freed blocks are kept, kernels for lengths that are past are not, and the peak is known."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536  # glibc's own
_KERNELS = 128

WEAR = 1.05
"""How much the heap may grow by holes, as a factor, before they are handed back."""

SETTLING_STEPS = 3
"""After so many steps the optimiser has its state, and the kernels of most products are compiled."""


def few_kernels_kept() -> None:
    """oneDNN keeps at most 128 compiled kernels, unless the environment says otherwise; call it before any computation.

    It compiles the products of every new number of tokens anew and keeps the last 1,024 of them, about a megabyte each,
    and torch keeps as many again: packs of ever other lengths would double a run's memory within a hundred steps. A
    step needs a few dozen.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, torch's around it
        os.environ.setdefault(cache, str(_KERNELS))


@contextmanager
def freed_blocks_kept(kept: bool = True) -> Iterator[None]:
    """While it lasts glibc does not hand large blocks back to the kernel after every use.

    A training step frees and takes the same blocks again and again, and each time the kernel would clear them page by
    page: they come from the heap instead of a mapping each, and the heap is not trimmed. Generating text takes blocks
    that grow with every token, which would leave the heap full of holes: `kept=False` is for that, inside of the other.
    Another C library than glibc goes on as it is.
    """
    before = _kept[-1]
    _keep(kept)
    _kept.append(kept)
    try:
        yield
    finally:
        _kept.pop()
        _keep(before)


_kept = [False]


def _keep(kept: bool) -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0 if kept else _MMAP_MAX)
    libc.mallopt(_M_TRIM_THRESHOLD, -1 if kept else _TRIM_THRESHOLD)
    if not kept:
        _hand_back_holes()


class HeapKeeper:
    """Hands the holes in a heap whose blocks are kept back to the kernel, when they have become too many.

    Blocks of ever other sizes, and kernels that live on between them, scatter what a step takes over more and more of
    the heap: a run's memory grew by 40 % in 40 steps. To hand back all holes after each step would have the kernel
    clear them again in the next.
    """

    def __init__(self) -> None:
        """Before the first step."""
        self._steps, self._tidy = 0, 0

    def mend(self) -> None:
        """After each step: hands holes back where the process holds WEAR times what it did after the first steps."""
        if not _kept[-1] or platform.libc_ver()[0] != "glibc":  # without it the kernel gets all blocks back anyway
            return
        held = resident_bytes()
        self._steps += 1
        if self._steps <= SETTLING_STEPS:
            self._tidy = max(self._tidy, held)
        elif held > WEAR * self._tidy:
            _hand_back_holes()


def _hand_back_holes() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """What this process holds now."""
    return psutil.Process().memory_info().rss


def forget_peak(device: torch.device) -> None:
    """`peak_bytes` counts from now on; where the kernel has no such thing, still from the start of the process."""
    if device.type == "cuda":
        torch.cuda.init()  # which nothing else may have done yet
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors on a CUDA device, or this process on a CPU, have held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # getrusage would tell of the process that started this one, where that was larger
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
