"""What a process holds does not grow with the number of lengths that it has seen."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lowrank.training.machine import memory

PRODUCTS = """
import ctypes, sys, torch
from lowrank.training.machine.memory import few_kernels_kept

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
if sys.argv[1] == "few":
    few_kernels_kept()
weight = torch.ones(64, 64).bfloat16()
used = []
for lengths in (range(1, 200), range(200, 500)):
    for length in lengths:
        torch.nn.functional.linear(torch.ones(length, 64).bfloat16(), weight)
    used.append(libc.mallinfo2().uordblks)
print(used[1] - used[0])
"""

HEAP = """
import random, sys, torch
from lowrank.training.machine.memory import HeapKeeper, forget_peak, freed_blocks_kept, peak_bytes

here, draw, keeper = torch.device("cpu"), random.Random(0), HeapKeeper()
living = [torch.ones(2**14) for _ in range(64)]  # what outlives a step, and lies between what does not
with freed_blocks_kept():
    peaks = []
    for step in range(40):
        blocks, live = [], 0
        while live < 2**25:
            blocks.append(torch.ones(draw.randrange(2**18, 2**22)))
            live += blocks[-1].numel()
            living[draw.randrange(64)] = torch.ones(draw.randrange(2**12, 2**15))
        del blocks
        if sys.argv[1] == "mended":
            keeper.mend()
        peaks.append(peak_bytes(here))
    print((peaks[-1] - peaks[0]) / 2**20)
    forget_peak(here)
    print(peak_bytes(here) < peaks[-1] or sys.argv[1] != "mended")
"""


def growth(kernels: str) -> int:
    caches = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    command = [sys.executable, "-c", PRODUCTS, kernels]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc for what is in use")
def test_kernels_for_past_lengths_are_dropped():
    without = growth("all")
    if without < 20 * 2**20:
        pytest.skip("this processor multiplies without oneDNN's kernels")
    assert growth("few") < without / 20


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_holes_in_the_heap_are_handed_back_when_there_are_many():
    grown = {}
    for kind in ("left", "mended"):
        command = [sys.executable, "-c", HEAP, kind]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        grown[kind] = float(lines[0])
        assert lines[1] == "True"
    assert grown["mended"] < 0.6 * grown["left"]


def test_a_tidy_heap_is_left_alone(monkeypatch):
    held = iter([80, 100, 90, 105, 106, 80, 110])
    trimmed = []
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(held))
    monkeypatch.setattr(memory, "_hand_back_holes", lambda: trimmed.append(True))
    monkeypatch.setattr(memory, "_kept", [True])
    keeper = memory.HeapKeeper()
    counts = []
    for _ in range(7):
        keeper.mend()
        counts.append(len(trimmed))
    assert counts == [0, 0, 0, 0, 1, 1, 2]
