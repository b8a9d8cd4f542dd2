"""Attention on a CPU, forward and backward: what `segments` chooses beside each of its kernels alone.

    python benchmarks/span_kernels.py                              # float32 and bfloat16, 128 ... 131,072 tokens
    python benchmarks/span_kernels.py --longest 131072 8192 --repeats 3

Spans of one length, as many as make 2,048 tokens, else one. Strips, torch's kernel and the choice take turns in one
process, and medians count; peaks above the inputs are taken in a process for each. From 32,768 tokens on a step of each
is all, of one head. Writes benchmarks/results/span-kernels-cpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from meter import extra_mebibytes
from yardstick import product_rate

from lowrank.attention.segmentwise import attend_spans
from lowrank.attention.span_kernels import by_torch
from lowrank.attention.spans import Spans, from_lengths
from lowrank.attention.stacked import StackedAttention
from lowrank.attention.strips import Rule
from lowrank.storage.machine_figures import processor
from lowrank.training.machine.memory import few_kernels_kept, freed_blocks_kept

RESULTS = Path(__file__).parent / "results"
BASE = ".cache/models/smollm2-135m-instruct"
SIDES = "strips", "torch", "chosen"
LONG = 32_768  # tokens, from which on a step of each is all
SIZE = 64  # of the heads
SPEED, MEMORY = 0.95, 1.1  # the bars: of the faster one's speed, and times its memory


class Case:
    """Inputs of one length and dtype, and a step of each side over them."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.spans: Spans = from_lengths([length] * max(1, 2048 // length), None)
        heads = (1, 1, 1) if length >= LONG else (9, 3, 3)
        shapes = [(self.spans.length, count, SIZE) for count in heads]
        self.q, self.k, self.v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
        self.grad = torch.randn(shapes[0], dtype=dtype)
        self.rule = Rule(SIZE**-0.5, None, None)
        self.chosen = "torch" if by_torch(self.spans, self.q, self.k, self.v, None, self.rule) else "strips"

    def step(self, side: str) -> float:
        """Forward and backward; the seconds."""
        began = time.perf_counter()
        if side == "chosen":
            out = attend_spans(self.q, self.k, self.v, None, self.spans, self.rule)
        else:
            torchs = tuple(range(len(self.spans.spans))) if side == "torch" else ()
            out = StackedAttention.apply(self.q, self.k, self.v, None, self.spans, self.rule, torchs)
            assert isinstance(out, torch.Tensor)
        out.backward(self.grad)
        self.q.grad = self.k.grad = self.v.grad = None
        return time.perf_counter() - began


def peak(side: str, length: int, dtype: torch.dtype) -> dict[str, float]:
    """MiB and seconds of one step, after a short one in which libraries make their plans."""
    Case(128, dtype).step(side)
    case, seconds = Case(length, dtype), []
    mebibytes = extra_mebibytes(lambda: seconds.append(case.step(side)), torch.device("cpu"))
    return {"mebibytes": mebibytes, "seconds": seconds[0]}


def turns(length: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of each side."""
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    with freed_blocks_kept():
        case = Case(length, dtype)
        for number in range(repeats + 1):
            for side in SIDES:
                seconds = case.step(side)
                taken[side] += [seconds] if number else []
    return {side: statistics.median(all_of) for side, all_of in taken.items()}


def row(length: int, dtype: str, repeats: int) -> dict[str, Any]:
    """All of one length."""
    asked = {side: _in_a_process("peak", side, length, dtype) for side in SIDES}
    if length < LONG:
        seconds = _in_a_process("turns", repeats, length, dtype)
    else:
        seconds = {side: one["seconds"] for side, one in asked.items()}
    mebibytes = {side: one["mebibytes"] for side, one in asked.items()}
    chosen = Case(min(length, LONG), getattr(torch, dtype)).chosen
    return {"length": length, "seconds": seconds, "mebibytes": mebibytes, "chosen": chosen}


def _in_a_process(*what: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", ":".join(map(str, what))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]], dtype: str) -> list[str]:
    """Markdown of one dtype."""
    lines = [
        f"## {dtype}",
        "",
        "| tokens | strips | torch's kernel | as chosen | chosen | of the faster one's speed | times its memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        seconds, mebibytes = one["seconds"], one["mebibytes"]
        faster = min(SIDES[:2], key=lambda side: seconds[side])
        cells = [f"{1e3 * seconds[side]:,.1f} ms / {mebibytes[side]:,.0f} MiB" for side in SIDES]
        speed, memory = seconds[faster] / seconds["chosen"], mebibytes["chosen"] / mebibytes[faster]
        kept = "" if speed >= SPEED and memory <= MEMORY else " MISSED"
        lines.append(
            f"| {one['length']:,} | {' | '.join(cells)} | {one['chosen']} | {speed:.2f} | {memory:.2f}{kept} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--longest", nargs="+", type=int, default=[131_072, 131_072], help="tokens, for each dtype")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    few_kernels_kept()
    if options.one:
        what, argument, length, dtype = options.one.split(":")
        asked = (int(length), getattr(torch, dtype))
        print(json.dumps(peak(argument, *asked) if what == "peak" else turns(*asked, int(argument))))
        return
    rates = [f"{product_rate(BASE, getattr(torch, d), 'cpu') / 1e9:.0f} GFLOP/s in {d}" for d in options.dtypes]
    lines = [
        "# Which kernel computes a span",
        "",
        f"{processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}; `python {' '.join(sys.argv)}`. "
        f"Plain products of a layer's shapes: {', '.join(rates)}. Nine heads of {SIZE} over three; from {LONG:,} "
        f"tokens on one. Bars: at least {SPEED} of the faster one's speed, at most {MEMORY} of its memory.",
        "",
    ]
    for dtype, longest in zip(options.dtypes, options.longest, strict=False):
        rows = []
        for length in [1 << n for n in range(7, 18) if 1 << n <= longest]:
            rows.append(row(length, dtype, options.repeats))
            print(dtype, rows[-1], file=sys.stderr)
        lines += table(rows, dtype)
    (RESULTS / "span-kernels-cpu.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
