"""Layers' weights in pinned host memory, and room on a device for two layers: one computes, the next is copied.

        copies    | 1 -> b      | 2 -> a      | 3 -> b
        computes  | 0 in a      | 1 in b      | 2 in a

A copy into a slot begins when what was computed with the slot's layer is done, and the layer computes when its copy is:
both waits are the device's, by events; the host waits for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from lowrank.errors import InputError
from lowrank.training.transforms.held_weights import Held

_ALIGNED = 256  # bytes: where an allocation of its own would begin


class _Slot:
    """Room for one layer.

    Attributes:
        room: Bytes on the device, (size,) uint8.
        holds: The layer that was copied there last.
        ready: When that is done.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.room = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.ready: Any = torch.cuda.Event()


@dataclass(frozen=True)
class _Weight:
    """One of a layer's: where it is held, and as it lies in each slot while the layer is there."""

    held: Held
    in_slots: tuple[nn.Parameter, nn.Parameter]


class DeviceSlots:
    """Brings layers' weights from pinned host memory into two slots.

    Args:
        blocks: Each layer's weights, on the host; they move to pinned memory, as the same modules' parameters.
        device: That computes.

    Raises:
        InputError: the host has not so much memory, or cannot pin it.
    """

    def __init__(self, blocks: Sequence[Sequence[Held]], device: torch.device) -> None:
        sizes = [_layout(block)[1] for block in blocks]
        _refuse_too_much(sum(sizes))
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.slots = tuple(_Slot(max(sizes), device) for _ in range(2))
        self.pinned, self.weights = [], []
        for block in blocks:
            pinned, held = _pinned(block)
            self.pinned.append(pinned)
            self.weights.append([_Weight(weight, self._in_slots(weight, start)) for weight, start in held])
        self.current = self.slots[0]
        self.told = f"the others in {sum(sizes) / 2**30:,.1f} GiB of pinned host memory"

    def enter(self, at: int, then: int | None) -> None:
        """The layer's copy is waited for on the device; the next one's is begun."""
        here = next((slot for slot in self.slots if slot.holds == at), None)
        if here is None:
            here = self._other(self.current)
            self._copy(at, here)
        other = self._other(here)
        if then is not None and other.holds != then:
            self._copy(then, other)
        torch.cuda.current_stream(self.device).wait_event(here.ready)
        self.current = here
        number = self.slots.index(here)
        for weight in self.weights[at]:
            own = weight.held.module._parameters
            assert own[weight.held.name] is weight.held.parameter, "a weight was replaced that is offloaded"
            own[weight.held.name] = weight.in_slots[number]

    def leave(self, at: int) -> None:
        """The modules have the host's parameters again; the slot is kept until another layer needs it."""
        for weight in self.weights[at]:
            weight.held.module._parameters[weight.held.name] = weight.held.parameter

    def _other(self, slot: _Slot) -> _Slot:
        return self.slots[0] if slot is self.slots[1] else self.slots[1]

    def _copy(self, at: int, slot: _Slot) -> None:
        """After all that has been computed so far, since that may read the slot."""
        free = torch.cuda.Event()
        free.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(free)
        slot.holds = None
        with torch.no_grad(), torch.cuda.stream(self.stream):
            slot.room[: len(self.pinned[at])].copy_(self.pinned[at], non_blocking=True)
            slot.ready.record(self.stream)
        slot.holds = at

    def _in_slots(self, held: Held, start: int) -> tuple[nn.Parameter, nn.Parameter]:
        first, second = (
            nn.Parameter(_view(slot.room, start, held.parameter), requires_grad=False) for slot in self.slots
        )
        return first, second


def _layout(block: Sequence[Held]) -> tuple[list[int], int]:
    """Where each weight of a layer begins, and the bytes of all."""
    starts, end = [], 0
    for held in block:
        starts.append(end)
        end += -(-held.parameter.nbytes // _ALIGNED) * _ALIGNED
    return starts, end


def _view(room: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return room[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _pinned(block: Sequence[Held]) -> tuple[torch.Tensor, list[tuple[Held, int]]]:
    """A layer's weights one behind another in pinned memory, and each of them there with where it begins.

    The memory is registered as it is: torch's own pinned allocator would round it up to a power of two.
    """
    starts, size = _layout(block)
    room = torch.empty(size, dtype=torch.uint8, device=block[0].parameter.device if block else None)
    if size:
        _register(room)
    moved = []
    for held, start in zip(block, starts, strict=True):
        here = nn.Parameter(_view(room, start, held.parameter), requires_grad=False)
        with torch.no_grad():
            here.copy_(held.parameter)
        held.module._parameters[held.name] = here
        moved.append((Held(held.module, held.name, here), start))
    return room, moved


def _register(room: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(room.data_ptr(), len(room), 0))
    if code != 0:
        raise InputError(
            f"CUDA cannot pin {len(room) / 2**20:,.0f} MiB of the host's memory (its error {code})",
            where="training.offload",
        )
    weakref.finalize(room.untyped_storage(), runtime.cudaHostUnregister, room.data_ptr())


def _refuse_too_much(size: int) -> None:
    free = psutil.virtual_memory().available
    if size > free:
        raise InputError(
            f"offloaded layers take {size / 2**30:,.1f} GiB of the host's memory, and {free / 2**30:,.1f} are free",
            where="training.offload",
            fix="Take a machine with more memory, a smaller base, or quantization in place of training.offload.",
        )
