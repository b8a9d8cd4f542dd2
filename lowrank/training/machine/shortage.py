"""Out of memory: what would help, with the run's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lowrank.errors import JobError

_CPU = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


@contextmanager
def told_when_short(device: torch.device, doing: str, advice: Sequence[str]) -> Iterator[None]:
    """While it lasts an allocation that fails becomes a JobError.

    Args:
        device: Whose memory it is.
        doing: What the run is at: "training with packs of 4,096 tokens".
        advice: What would need less, the first thing to try first.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _short(error):
            raise
        raise JobError(
            f"out of memory while {doing}: {_held(device)}", fix="What would help: " + "; ".join(advice) + "."
        ) from error


def _short(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in _CPU)


def _held(device: torch.device) -> str:
    if device.type != "cuda":
        return "the machine has no more to give"
    held, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return f"{held / 2**30:.2f} GiB were held of the {total / 2**30:.2f} GiB of {torch.cuda.get_device_name(device)}"
