"""What all contestants share: the job that they are given, the rows that they train on, and what they report.

Each runs in a process of its own and prints one line of JSON at its end; `benchmarks/finetune.py` reads it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass

import numpy as np

STARTED = time.perf_counter()
LONGEST = 1000


@dataclass(frozen=True)
class Job:
    """One fine-tune.

    Attributes:
        model: The folder of the base.
        method: lora, dora, or qlora.
        dtype: bfloat16 or float32.
        r: The rank, on all linear layers; lora_alpha is twice as much.
        rows: In a step.
        steps: Optimiser steps; the first is warm-up and not counted.
        seed: Of the rows and the adapter.
        mean_length: Of the rows, in tokens; lengths are lognormal, at most `LONGEST`.
        learning_rate: AdamW's, constant.
    """

    model: str
    method: str = "lora"
    dtype: str = "bfloat16"
    r: int = 16
    rows: int = 16
    steps: int = 4
    seed: int = 0
    mean_length: int = 200
    learning_rate: float = 1e-4


def read_job() -> Job:
    """From the command line's only argument."""
    return Job(**json.loads(sys.argv[1]))


def rows_of(job: Job, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every row, chat-shaped: the second half of each carries loss."""
    rng = np.random.default_rng(job.seed)
    sigma = 0.6
    drawn = rng.lognormal(np.log(job.mean_length) - sigma**2 / 2, sigma, job.rows * job.steps)
    rows = []
    for length in np.clip(drawn, 16, LONGEST).astype(int):
        ids = rng.integers(10, vocabulary, length).tolist()
        rows.append((ids, [-100] * (length // 2) + ids[length // 2 :]))
    return rows


class Record:
    """Times steps and notes their losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: float) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())
        self.losses.append(loss)

    def report(self, tokens: int, supervised: int) -> None:
        """Prints the result.

        Args:
            tokens: Of the steps after the first: those of the rows, padding not counted.
            supervised: Those of them that carry loss.
        """
        seconds = self.ends[-1] - self.ends[0]
        result = {
            "tokens_per_second": tokens / seconds,
            "supervised_per_second": supervised / seconds,
            "seconds_a_step": seconds / (len(self.ends) - 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "first_step_after": self.ends[0] - STARTED,
            "losses": self.losses,
        }
        print(json.dumps(result), flush=True)


def counted(rows: list[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """Tokens of some rows, and supervised ones."""
    return sum(len(ids) for ids, _ in rows), sum(label != -100 for _, labels in rows for label in labels)
