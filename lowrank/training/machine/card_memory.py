"""What a run holds of a card beside its tensors: the CUDA context, holes between blocks, what NCCL sends from."""

from __future__ import annotations

import os

import torch

_GiB, _MiB = 2**30, 2**20

CONTEXT = int(0.6 * _GiB)
"""What CUDA, its libraries and torch's kernels take of a card in each process, where it cannot be asked."""

_WIDEST_CONTEXT = 2 * _GiB  # more than this between all that is used and what the allocator has: others are on the card
_NCCL_BUFFER, _NCCL_CHANNELS = 4 * _MiB, 32  # NCCL's documentation: the size of NCCL_BUFFSIZE, the most channels
_WAYS = 2  # of a ring: from the neighbour before, to the one behind


def beside_tensors(device: torch.device, processes: int) -> dict[str, int]:
    """Bytes of a card that hold no tensor, each kind by its name; nothing on a CPU.

    Args:
        device: Of the run, after its first steps.
        processes: Of the run, each with a card of its own.
    """
    if device.type != "cuda":
        return {}
    holes = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    parts = {"the CUDA context": _context(device), "holes between the allocator's blocks": holes}
    return parts | ({"NCCL's buffers": _messages()} if processes > 1 else {})


def _context(device: torch.device) -> int:
    """All that is used of the card and not the allocator's."""
    if not torch.cuda.is_initialized():
        return CONTEXT
    free, total = torch.cuda.mem_get_info(device)
    found = total - free - torch.cuda.memory_reserved(device)
    return found if 0 < found <= _WIDEST_CONTEXT else CONTEXT


def _messages() -> int:
    """NCCL takes a buffer for each channel and way."""
    size = int(os.environ.get("NCCL_BUFFSIZE", _NCCL_BUFFER))
    return _WAYS * size * int(os.environ.get("NCCL_MAX_NCHANNELS", _NCCL_CHANNELS))
