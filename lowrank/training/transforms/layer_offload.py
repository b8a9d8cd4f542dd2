"""Layers whose frozen weights are where the model computes for as long as one computes, and elsewhere before and after.

A base that is larger than a card trains layer by layer: its layers' matrices stay in the host's memory, or in the
model's files where the host computes itself. While one layer runs the next one's are on their way; in the backward pass
each layer runs again (`recompute`), so its weights are needed then and not in between. Embeddings, the head, norms,
biases, adapters, and what several layers share, stay on the device.

This is no device_map of accelerate's (`lowrank.adapters.offload`): that has no backward pass.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import nn

from lowrank.adapters.modules import ADAPTERS
from lowrank.errors import InputError
from lowrank.quantisers.registry import quantiser_of
from lowrank.training.transforms.device_slots import DeviceSlots
from lowrank.training.transforms.file_pages import FilePages
from lowrank.training.transforms.held_weights import Held
from lowrank.training.transforms.layers import layers_of
from lowrank.training.transforms.recompute import recompute_activations
from lowrank.training.transforms.recompute_modes import RecomputeMode

_KEY = "training.offload"


class _Carrier(Protocol):
    """What brings layers' weights, by the layer's number."""

    told: str
    """Where the weights are, in words."""

    def enter(self, at: int, then: int | None) -> None:
        """A layer begins: its weights are there for what is computed from now on, and the modules have them. Those of
        the layer `then` set out; those of all others may be let go."""
        ...

    def leave(self, at: int) -> None:
        """It has run; the modules have their weights as before. What autograd saved of them may still be read, until
        another layer begins."""
        ...


@dataclass(frozen=True)
class Offloaded:
    """What was offloaded.

    Attributes:
        layers: Bytes of each layer's weights that come and go.
        told: Where they are meanwhile, in words.
    """

    layers: Sequence[int]
    told: str

    @property
    def elsewhere(self) -> int:
        """Bytes that are never with the rest: all but the two layers that are there at one time."""
        return sum(self.layers) - max((sum(pair) for pair in pairwise(self.layers)), default=sum(self.layers))

    def __str__(self) -> str:
        mebibytes = max(self.layers) / 2**20
        return f"{len(self.layers)} layers of up to {mebibytes:,.1f} MiB, two at a time; {self.told}; each runs twice"


def offload_layers(model: Any, device: torch.device, recompute: Literal[True] | RecomputeMode = True) -> Offloaded:
    """Has the frozen matrices of a model's layers come when they are needed; everything else moves to the device.

    Args:
        model: On the CPU, adapters in; layers recompute their activations from here on.
        device: That it computes on: CUDA, or the CPU, whose weights are mapped from files.
        recompute: What layers keep of their activations; "selective" they cannot.

    Raises:
        InputError: the model's layers are not known, do not recompute or are not frozen; a library holds their weights;
            the host has no room; on the CPU: they are not mapped from files.
    """
    layers = _outermost(layers_of(model, _KEY))
    blocks = [_weights(layer) for layer in layers]
    times = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    blocks = [[held for held in block if times[id(held.parameter)] == 1] for block in blocks]
    _refuse(model, layers, blocks)
    if device.type != "cpu":
        with _taken_out(blocks):
            model.to(device)
    recompute_activations(model, recompute)
    sizes = [sum(held.parameter.nbytes for held in block) for block in blocks]
    carrier: _Carrier = FilePages(blocks) if device.type == "cpu" else DeviceSlots(blocks, device)
    passage = _Passage(carrier, len(layers))
    for at, layer in enumerate(layers):
        passage.through(at, layer)
    return Offloaded(sizes, carrier.told)


def _outermost(layers: list[nn.Module]) -> list[nn.Module]:
    """Those that no other one holds, in the order in which they run."""
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def _weights(layer: nn.Module) -> list[Held]:
    """Its frozen matrices, adapters' aside."""
    found = []
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad or parameter.dim() < 2 or f".{ADAPTERS}." in f".{name}":
            continue
        path, _, own = name.rpartition(".")
        found.append(Held(layer.get_submodule(path), own, parameter))
    return found


def _refuse(model: Any, layers: Sequence[nn.Module], blocks: Sequence[Sequence[Held]]) -> None:
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise InputError(f"accelerate moves the weights of {path or type(model).__name__} already", where=_KEY)
        if (quantiser := quantiser_of(module)) is not None:
            raise InputError(
                f"{path} is held in few bits by {quantiser.name}, whose weights stay on the device",
                where=_KEY,
                fix="Take the base as it was before it was quantised, or leave training.offload out.",
            )
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        kinds = " and ".join(sorted({type(layer).__name__ for layer in layers}))
        raise InputError(
            f"the layers of {type(model).__name__} ({kinds}) do not recompute their activations one by one, and "
            "without that a layer's weights are needed all the time",
            where=_KEY,
        )
    if not any(blocks):
        raise InputError(
            f"the layers of {type(model).__name__} have no frozen matrices of their own: nothing can be offloaded",
            where=_KEY,
            fix="Take an adapter (adapter.method), or leave training.offload out.",
        )


@contextmanager
def _taken_out(blocks: Sequence[Sequence[Held]]) -> Iterator[None]:
    """The modules without these weights."""
    for block in blocks:
        for held in block:
            held.module._parameters[held.name] = None
    try:
        yield
    finally:
        for block in blocks:
            for held in block:
                held.module._parameters[held.name] = held.parameter


class _Passage:
    """The way of a pass through the layers: forward, or backward while autograd runs."""

    def __init__(self, carrier: _Carrier, count: int) -> None:
        self.carrier, self.count = carrier, count
        self.inside: int | None = None

    def through(self, at: int, layer: Any) -> None:
        """Has a layer's weights come for each of its runs.

        Those that autograd may ask for again are recomputed: what runs twice is what the layer hands to its checkpoint.
        """
        layer._gradient_checkpointing_func = functools.partial(self._checkpoint, at, layer._gradient_checkpointing_func)
        layer.__dict__["forward"] = functools.partial(self._forward, at, layer)

    def _forward(self, at: int, layer: Any, *args: Any, **kwargs: Any) -> Any:
        forward = type(layer).forward
        if torch.is_grad_enabled():
            if layer.training:
                return forward(layer, *args, **kwargs)
            # out of training layers recompute nothing by themselves
            return layer._gradient_checkpointing_func(functools.partial(forward, layer, **kwargs), *args)
        return self._run(at, functools.partial(forward, layer), *args, **kwargs)

    def _checkpoint(self, at: int, checkpoint: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(self._run, at, function), *args, **kwargs)

    def _run(self, at: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.inside == at else self._here(at):
            return function(*args, **kwargs)

    @contextmanager
    def _here(self, at: int) -> Iterator[None]:
        assert self.inside is None, "a layer runs inside of another"
        self.carrier.enter(at, self._next(at))
        self.inside = at
        try:
            yield
        finally:
            self.inside = None
            self.carrier.leave(at)

    def _next(self, at: int) -> int | None:
        """The layer that most likely runs after this one. Where a pass turns round or ends that is one that was there
        just now."""
        if torch._C._current_graph_task_id() != -1:  # autograd runs
            return at - 1 if at > 0 else None
        if at + 1 < self.count:
            return at + 1
        return None if torch.is_grad_enabled() else 0
