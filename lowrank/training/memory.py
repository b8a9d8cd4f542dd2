"""Memory: blocks that the allocator has on the CPU are kept, and the peak is known."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536  # glibc's own


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
        libc.malloc_trim(0)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors on a CUDA device, or this process on a CPU, have held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
