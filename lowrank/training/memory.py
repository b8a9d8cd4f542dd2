"""Memory: blocks that the allocator has on the CPU are kept, and the peak is known."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_blocks() -> bool:
    """Tells glibc not to hand large blocks back to the kernel after every use.

    A training step frees and takes the same blocks again and again, and each time the kernel would clear them page by
    page. Large blocks come from the heap instead of a mapping each, and the heap is not trimmed.

    Returns:
        Whether it was done: only where the C library is glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors on a CUDA device, or this process on a CPU, have held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
