"""What the machine at hand is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from lowrank.recipes.parts.products import WORTH
from lowrank.training.machine.card_memory import CONTEXT
from lowrank.training.machine.product_rates import ANY_MODEL, times_as_fast

GiB = 2**30


@dataclass(frozen=True)
class Machine:
    """Where a run would take place.

    Attributes:
        memory: Free bytes of the host.
        cores: Of its processor that this process may use.
        cards: How many accelerators there are.
        card: Free bytes of one; None without.
        card_name: Its name.
        bfloat16: How many times as fast as float32 products are in bfloat16, on the device that trains.
    """

    memory: int
    cores: int
    cards: int = 0
    card: int | None = None
    card_name: str = ""
    bfloat16: float = 1.0

    @property
    def room(self) -> int:
        """Bytes that a run may take."""
        return int(0.9 * self.card - CONTEXT) if self.card is not None else int(0.85 * self.memory)

    @property
    def computes_wide(self) -> bool:
        """Whether `model.compute_dtype: auto` takes float32 products beside weights in 16 bits."""
        return self.card is None and 1 / self.bfloat16 >= WORTH

    def __str__(self) -> str:
        if self.card is None:
            return f"{self.cores} cores, {self.memory / GiB:.1f} GiB of memory free"
        several = f"{self.cards} x " if self.cards > 1 else ""
        return f"{several}{self.card_name}, {self.card / GiB:.1f} GiB free"


def machine_at_hand() -> Machine:
    """Looks, and tries a few products; under a second."""
    memory, cores = psutil.virtual_memory().available, len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        fast = 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.5
        return Machine(memory, cores, torch.cuda.device_count(), free, torch.cuda.get_device_name(), fast)
    return Machine(memory, cores, bfloat16=times_as_fast(torch.bfloat16, torch.float32, ANY_MODEL))
