"""Layers' weights in the model's files, which the process has mapped: those that are not needed now take no memory.

On the CPU nothing is copied. A layer computes from the file's own pages; when another's turn has come they are given
back to the kernel, which keeps them for as long as it has room, and reads them again when they are touched. The next
layer's are asked for in advance.

A page that this process has written to is its own and no longer the file's: it stays.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from lowrank.errors import InputError
from lowrank.training.transforms.held_weights import Held

_PAGE = mmap.PAGESIZE
_NEAR = 2**20  # bytes between weights of a layer, where its norms lie
_OF_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))  # Linux, admin-guide/mm/pagemap


class FilePages:
    """Lets go of layers' pages, and asks for them.

    Args:
        blocks: Each layer's weights.

    Raises:
        InputError: none of them is mapped from a file, or the system is not Linux.
    """

    def __init__(self, blocks: Sequence[Sequence[Held]]) -> None:
        if sys.platform != "linux":
            raise InputError("on a CPU layers are offloaded on Linux alone", where="training.offload")
        maps = list(_file_maps())
        self.parts = [_parts(block, maps) for block in blocks]
        whole = sum(held.parameter.nbytes for block in blocks for held in block)
        mapped = sum(held.parameter.nbytes for block in blocks for held in block if _mapped(held, maps))
        if not mapped:
            raise InputError(
                "no weight of the model's layers lies in a file as it is used: they were converted when they were "
                "loaded, or an initialisation has changed them",
                where="training.offload",
                fix="Leave model.dtype to the checkpoint, or save the model as it is loaded here and train that.",
            )
        rest = "" if mapped == whole else f", but {(whole - mapped) / 2**20:,.1f} MiB, converted when loaded, in memory"
        self.told = f"the others in the model's files{rest}"
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._here, self._last = set(range(len(blocks))), 0
        self._let_go_of_all_but(set())

    def enter(self, at: int, then: int | None) -> None:
        """The next layer's pages are asked for, the others' let go: all but the last one's, where none is next."""
        wanted = {at, self._last if then is None else then}
        self._let_go_of_all_but(wanted)
        for part in self.parts[then] if then is not None and then not in self._here else ():
            self._advise(part, mmap.MADV_WILLNEED)
        self._here, self._last = wanted, at

    def leave(self, at: int) -> None:
        """They stay for the backward pass."""

    def _let_go_of_all_but(self, wanted: set[int]) -> None:
        for at in self._here - wanted:
            for part in self.parts[at]:
                for clean in _untouched(part):
                    self._advise(clean, mmap.MADV_DONTNEED)
        self._here &= wanted

    def _advise(self, part: range, advice: int) -> None:
        if self._libc.madvise(ctypes.c_void_p(part.start), ctypes.c_size_t(len(part)), advice):
            code = ctypes.get_errno()
            raise OSError(code, f"madvise: {os.strerror(code)}")


def _file_maps() -> Iterator[range]:
    """Addresses at which this process has files mapped for itself."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, flags, _, _, inode, *name = line.split(maxsplit=5)
        if flags[3] == "p" and inode != "0" and name:
            begin, end = (int(bound, 16) for bound in bounds.split("-"))
            yield range(begin, end)


def _mapped(held: Held, maps: Sequence[range]) -> range | None:
    at = held.parameter.data_ptr()
    return next((each for each in maps if at in each and at + held.parameter.nbytes <= each.stop), None)


def _parts(block: Sequence[Held], maps: Sequence[range]) -> list[range]:
    """The whole pages that a layer's weights lie on, near ones together; of none that is not mapped from a file."""
    found: list[tuple[range, range]] = []  # what a layer takes of a map, and the map
    for held in sorted(block, key=lambda held: held.parameter.data_ptr()):
        mapping = _mapped(held, maps)
        if mapping is None:
            continue
        start = held.parameter.data_ptr() // _PAGE * _PAGE
        stop = -(-(held.parameter.data_ptr() + held.parameter.nbytes) // _PAGE) * _PAGE
        if found and found[-1][1] == mapping and start - found[-1][0].stop <= _NEAR:
            start = found.pop()[0].start
        found.append((range(start, min(stop, mapping.stop)), mapping))
    return [part for part, _ in found]


def _untouched(part: range) -> Iterator[range]:
    """The stretches of pages that are still the file's."""
    count = len(part) // _PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        entries = np.frombuffer(os.pread(table.fileno(), 8 * count, part.start // _PAGE * 8), dtype=np.uint64)
    own = ((entries & _PRESENT) != 0) & ((entries & _OF_FILE) == 0) | ((entries & _SWAPPED) != 0)
    edges = [-1, *np.flatnonzero(own).tolist(), count]
    for before, after in pairwise(edges):
        if after - before > 1:
            yield range(part.start + (before + 1) * _PAGE, part.start + after * _PAGE)
