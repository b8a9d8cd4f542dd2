"""One adapter for each row of a batch: the base runs once for all, and each adapter adds to its own rows."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.methods.layer import Layer
from lowrank.adapters.modules import bare, submodule
from lowrank.errors import InputError

_TURNED = re.compile(r"(transpose|swapaxes)\(\s*(0\s*,\s*1|1\s*,\s*0)\s*\)|permute\(\s*\(?\s*1\s*,\s*0\b")


@dataclass
class Routing:
    """Which adapter acts on which row.

    Attributes:
        rows: An adapter, or None, for each row of the batch.
        turning: Names of the model's classes that put the sequence first somewhere: where a module's input has as many
            rows as the batch in both places, which is which cannot be seen.
        repeats: How often `generate` has each row in its batch, one after another (beams, several answers).
    """

    rows: tuple[str | None, ...]
    turning: tuple[str, ...] = ()
    repeats: int = 1

    def add(
        self,
        module: HostModule,
        layers: Mapping[str, Layer],
        y: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module's output for all rows, given its own output y.

        Raises:
            InputError: the module's input has not the batch's rows in its first dimension, or it is no plain function
                of one tensor.
        """
        present = [name for name in dict.fromkeys(self.rows) if name in layers]
        if not present:
            return y
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or not isinstance(y, torch.Tensor):
            raise InputError(
                f"a {type(module).__name__} takes or gives more than one tensor, and its rows cannot be routed one by "
                "one",
                fix="Run the rows of each adapter as a batch of their own, with lowrank.using.",
            )
        x = args[0]
        rows = self._rows_of(module, x)
        for name in present:
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=y.device)
            if layers[name].replaces:
                y = y.index_copy(0, index, layers[name].output(module, x[index]).to(y.dtype))
            else:
                delta = layers[name].delta(module, x[index], y[index])
                y = y.index_add(0, index, delta.to(y.dtype).expand(len(index), *y.shape[1:]))
        return y

    def _rows_of(self, module: HostModule, x: torch.Tensor) -> tuple[str | None, ...]:
        given = len(self.rows)
        counts = {given, given * self.repeats}
        if x.ndim == 0 or x.shape[0] not in counts:
            raise InputError(
                f"routed() was given {given} rows, and a {type(module).__name__} sees a batch of {len(x)}",
                fix="Give one adapter (or None) for each row. Layers that mix rows cannot be routed.",
            )
        if given > 1 and self.turning and x.ndim > 1 and x.shape[1] in counts:
            raise InputError(
                f"routed() was given {given} rows, and a {type(module).__name__} sees {tuple(x.shape)}: which of the "
                f"first two dimensions holds the rows cannot be told, since {', '.join(self.turning)} may swap them",
                fix="Give the batch another length, or run the rows of each adapter as a batch of their own.",
            )
        return self.rows if len(x) == given else tuple(row for row in self.rows for _ in range(self.repeats))


def turning(model: HostModule, paths: list[str]) -> tuple[str, ...]:
    """The classes above the modules at `paths` that may put the sequence before the batch."""
    above = {path.rpartition(".")[0][:end] for path in paths for end in _ends(path)}
    owners = [bare(model), *(submodule(model, path) for path in above)]
    named = {type(o).__name__ for o in owners if _turns(type(o)) or _is_sequence_first(o)}
    return tuple(sorted(named))


def _is_sequence_first(owner: nn.Module) -> bool:
    """torch's flag, on a module or on the attention that it is built around."""
    return any(getattr(module, "batch_first", True) is False for module in (owner, *owner.children()))


def _ends(path: str) -> list[int]:
    return [i for i, letter in enumerate(path) if letter == "."]


@functools.cache
def _turns(owner: type) -> bool:
    """Whether a module class swaps its input's first two dimensions; one without a source may."""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return True
    return bool(_TURNED.search(source))


def note_repeats(model: HostModule, expand: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of `generate`'s step that repeats each row for its beams or answers."""
    routing = model._lowrank.activity.now.routing
    if routing is not None:
        routing.repeats = inspect.signature(expand).bind_partial(*args, **kwargs).arguments.get("expand_size", 1)
    return expand(*args, **kwargs)
