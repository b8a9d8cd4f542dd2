"""Ctrl-C while a model answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria


class Ended(StoppingCriteria):
    """Ends `generate` behind the token during which it was asked to."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Whether each of the rows (batch,) ends here."""
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


@contextmanager
def ended_by_interrupt() -> Iterator[Ended]:
    """Within the block the first Ctrl-C asks the answer to end; another raises KeyboardInterrupt, as ever."""
    ended = Ended()
    if threading.current_thread() is not threading.main_thread():  # signals come to the main one
        yield ended
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def end(number: int, frame: Any) -> None:
        ended.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, before)
