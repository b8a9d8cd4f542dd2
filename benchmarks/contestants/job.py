"""What all contestants share: the job that they are given, the rows that they train on, and what they report.

Each runs in a process of its own and prints one line of JSON at its end; `benchmarks/finetune.py` reads it. Two of them
run in an environment without transformers: only numpy and the standard library are needed here.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

AT_A_TIME = 8  # rows that are padded together, where rows are padded
ALPHABET = 64
IGNORED = -100
Row = tuple[list[int], list[int]]
"""input_ids and labels."""


@dataclass(frozen=True)
class Job:
    """One fine-tune.

    Attributes:
        model: The folder of the base.
        method: lora, dora, or qlora.
        dtype: bfloat16 or float32.
        device: cpu or cuda.
        r: The rank, on all linear layers; lora_alpha is twice as much.
        rows: In a step.
        steps: Optimiser steps; the first is warm-up and not counted.
        seed: Of the rows and the adapter.
        mean_length: Of the rows, in tokens.
        spread: Of the logarithm of the lengths, which are lognormal; 0 for rows of one length.
        longest: Of a row, in tokens.
        system: So many tokens at the beginning of every row are the same.
        rows_file: JSON Lines of rows to draw from, instead of random ones; see `rows_of`.
        pack_tokens: In a pack; by default as many as a padded batch holds.
        learning_rate: AdamW's, constant.
        launched: When the process was started, in seconds of `time.time`.
    """

    model: str
    method: str = "lora"
    dtype: str = "bfloat16"
    device: str = "cpu"
    r: int = 16
    rows: int = 16
    steps: int = 4
    seed: int = 0
    mean_length: int = 200
    spread: float = 0.6
    longest: int = 1000
    system: int = 0
    rows_file: str | None = None
    pack_tokens: int | None = None
    learning_rate: float = 1e-3
    launched: float = 0.0

    @property
    def padded_together(self) -> int:
        """Rows in a padded batch."""
        return min(AT_A_TIME, self.rows)

    @property
    def pack(self) -> int:
        """Tokens in a pack: as many as a padded batch holds on average without its padding."""
        return self.pack_tokens or max(self.longest, self.padded_together * self.mean_length)


def read_job() -> Job:
    """From the command line's last argument."""
    return Job(**json.loads(sys.argv[-1]))


def read_config(folder: str) -> dict:
    """A model's config.json."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def rows_of(job: Job, vocabulary: int) -> list[Row]:
    """The rows of all steps, chat-shaped: the second half of each carries loss.

    What carries loss is drawn from `ALPHABET` tokens alone, the same in all rows: there is something to learn, and as
    much in every row. Ids below 10 do not occur, so that padding can be told from tokens. Behind a system prompt, which
    carries none, it is half of the turn. Rows of a file are `[input_ids, labels]` each, drawn from it without repeats.
    """
    rng = np.random.default_rng(job.seed)
    if job.rows_file is not None:
        lines = Path(job.rows_file).read_text(encoding="utf-8").splitlines()
        drawn = rng.permutation(len(lines))[: job.rows * job.steps]
        return [(ids, labels) for ids, labels in (json.loads(lines[at]) for at in drawn)]
    lengths = _lengths(job, rng)
    alphabet = rng.choice(np.arange(10, vocabulary), ALPHABET, replace=False)
    system = rng.integers(10, vocabulary, job.system).tolist()
    rows = []
    for length in lengths:
        turn = length - job.system
        asked = system + rng.integers(10, vocabulary, turn // 2).tolist()
        answered = rng.choice(alphabet, turn - turn // 2).tolist()
        rows.append((asked + answered, [IGNORED] * len(asked) + answered))
    return rows


def lengths_of(job: Job) -> list[int]:
    """Tokens of each of `rows_of`."""
    if job.rows_file is not None:
        return [len(ids) for ids, _ in rows_of(job, 0)]
    return _lengths(job, np.random.default_rng(job.seed))


def _lengths(job: Job, rng: np.random.Generator) -> list[int]:
    drawn = rng.lognormal(np.log(job.mean_length) - job.spread**2 / 2, job.spread, job.rows * job.steps)
    return np.clip(drawn.round(), 16, job.longest).astype(int).tolist()


def counted(rows: Sequence[Row]) -> tuple[int, int]:
    """Tokens of some rows, and supervised ones."""
    return sum(len(ids) for ids, _ in rows), sum(label != IGNORED for _, labels in rows for label in labels)


def packs_a_step(job: Job, rows: Sequence[Row]) -> int:
    """So many full packs hold what a step holds on average."""
    return max(1, round(counted(rows)[0] / job.steps / job.pack))


class Record:
    """Times steps, and notes their losses and what was in them."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        self._tokens = self._supervised = 0

    def add(self, tokens: int, supervised: int) -> None:
        """A batch of the step at hand: its tokens without padding, and those of them that carry loss."""
        self._tokens, self._supervised = self._tokens + tokens, self._supervised + supervised

    def step(self, loss: float) -> None:
        """A step has ended."""
        self.ends.append(time.time())
        self.losses.append(loss)
        self.sizes.append((self._tokens, self._supervised))
        self._tokens = self._supervised = 0

    def report(self, job: Job, libraries: Sequence[str]) -> None:
        """Prints the result; the first step is warm-up and no part of the rates."""
        seconds = self.ends[-1] - self.ends[0]
        tokens, supervised = (sum(part) for part in zip(*self.sizes[1:], strict=True))
        result = {
            "tokens_per_second": tokens / seconds,
            "supervised_per_second": supervised / seconds,
            "seconds_a_step": seconds / (len(self.ends) - 1),
            "peak_mib": _peak_mebibytes(job.device),
            "first_step_after": self.ends[0] - job.launched,
            "ended_after": [end - job.launched for end in self.ends],
            "losses": self.losses,
            "sizes": self.sizes,
            "versions": {name: version_of(name) for name in libraries},
        }
        print(json.dumps(result), flush=True)


def _peak_mebibytes(device: str) -> float:
    """The most that the process held, or the most that its tensors held on the card."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def version_of(name: str) -> str:
    """An installed package's version, or that of one that is imported from where it lies."""
    try:
        return version(name)
    except PackageNotFoundError:
        return str(import_module(name).__version__)
