"""How the tokens of an answer are chosen: the likeliest each time, or drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from lowrank.errors import InputError

_COLDEST = 1e-3  # below it logits overflow


@dataclass(frozen=True)
class Sampling:
    """Options of transformers' `generate`; greedy where none of them is set, and at temperature 0.

    The seed is set before every answer, so that an answer does not depend on what was asked before it.

    Raises:
        InputError: a value that means nothing, alone or beside the others.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        warm, given = self.temperature, self.top_p is not None or self.top_k is not None
        if warm is not None and warm != 0 and not _COLDEST <= warm < math.inf:
            raise InputError(f"temperature: {warm} is neither 0 (greedy) nor {_COLDEST} or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} is not above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: {self.top_k} is not 1 or more")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed: {self.seed} is not between 0 and 2^63 - 1")
        if not self.draws and (given or self.seed is not None):
            raise InputError("greedy answers draw nothing", fix="Give a temperature above 0, or leave the rest out.")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        given = any(value is not None for value in (self.temperature, self.top_p, self.top_k))
        return given and self.temperature != 0

    @contextmanager
    def drawing(self, config: GenerationConfig, device: torch.device) -> Iterator[None]:
        """Writes the options into `config`; within the block torch draws from the seed, if there is one."""
        if self.draws:
            options: dict[str, Any] = {"temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0}
            config.update(do_sample=True, top_k=self.top_k or 0, **options)  # 0: not transformers' own 50
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield


GREEDY = Sampling()
