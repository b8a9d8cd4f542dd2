"""One adapter for each row of a batch, or segment of a pack: the base runs once for all, and each adapter adds to what
is its own."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.wide import own_output
from lowrank.adapters.methods.layer import Layer, LowRankLayer
from lowrank.adapters.modules import bare, submodule
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank
from lowrank.ops.routed_linear import Part, routed_linear

_TURNED = re.compile(r"(transpose|swapaxes)\(\s*(0\s*,\s*1|1\s*,\s*0)\s*\)|permute\(\s*\(?\s*1\s*,\s*0\b")


class _Run(NamedTuple):
    """Rows or tokens that lie together and have one adapter, or none: those from `start` to before `stop`."""

    name: str | None
    start: int
    stop: int


@dataclass
class Routing:
    """Which adapter acts where: on which row of the batch or, with `lengths`, on which segment of one row.

    Attributes:
        names: An adapter, or None, for each row or segment.
        lengths: Tokens of each segment; None: the names are of rows.
        random: What the dropout of each adapter draws from; of one that is not named here, torch's own generator.
        turning: Names of the model's classes that put the sequence first somewhere: where a module's input has as many
            rows as the batch in both places, which is which cannot be seen.
        repeats: How often `generate` has each row in its batch, one after another (beams, several answers).
    """

    names: tuple[str | None, ...]
    lengths: tuple[int, ...] | None = None
    random: Mapping[str, torch.Generator] = field(default_factory=dict)
    turning: tuple[str, ...] = ()
    repeats: int = 1

    def __post_init__(self) -> None:
        self._lay_out()

    def _lay_out(self) -> None:
        runs: list[_Run] = []
        place = 0
        for name, length in zip(self.names, self.lengths or [1] * len(self.names), strict=True):
            if runs and runs[-1].name == name:
                runs[-1] = runs[-1]._replace(stop=place + length)
            elif length:
                runs.append(_Run(name, place, place + length))
            place += length
        self.runs, self.total = runs, place

    def keep_rows(self, rows: Sequence[int]) -> None:
        """The batch is what these rows of it were, from now on."""
        self.names = tuple(self.names[row] for row in rows)
        self._lay_out()

    def output(
        self, module: HostModule, layers: Mapping[str, Layer], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's output, each row or token with its adapter.

        Raises:
            InputError: the module's input has not the batch's rows in its first dimension (or the pack's tokens in its
                first that counts more than one), or it is no plain function of one tensor.
        """
        acting = [run for run in self.runs if run.name in layers]
        if not acting:
            return own_output(module, *args, **kwargs)
        x = args[0] if args else None
        if len(args) != 1 or kwargs or not isinstance(x, torch.Tensor):
            raise _several_tensors(module)
        axis, times = self._place_of(module, x)
        by_one = self._by_one_function(module, layers, acting, x, times * math.prod(x.shape[axis + 1 : -1]))
        if by_one is not None:
            return by_one
        y = own_output(module, x)
        if not isinstance(y, torch.Tensor):
            raise _several_tensors(module)
        sizes = [times * (run.stop - run.start) for run in self.runs]
        pieces = [
            here if run.name not in layers else self._with_layer(module, layers[run.name], run.name, there, here)
            for run, there, here in zip(self.runs, x.split(sizes, axis), y.split(sizes, axis), strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def _with_layer(
        self, module: HostModule, layer: Layer, name: str | None, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """What the module gives for a piece of its input with a layer, given its own output there."""
        if name in self.random and getattr(layer, "dropout", 0) and module.training:
            raise InputError(
                f"the dropout of {name!r} on a {type(module).__name__} draws from torch's own generator alone",
                fix="Train this adapter by itself, or set lora_dropout to 0.",
            )
        if layer.replaces:
            return layer.output(module, x).to(y.dtype)
        return y + layer.delta(module, x, y).to(y.dtype)

    def _by_one_function(
        self, module: HostModule, layers: Mapping[str, Layer], acting: list[_Run], x: torch.Tensor, times: int
    ) -> torch.Tensor | None:
        """The output of a module that is a plain product, under low-rank terms alone; None of any other.

        Args:
            times: So many of the flattened input's rows belong to each row or token.
        """
        found = [layers[run.name] for run in acting if run.name is not None]
        if not all(isinstance(layer, LowRankLayer) for layer in found):
            return None
        product = cast("LowRankLayer", found[0]).kind.product(module)
        bias = getattr(module, "bias", None)
        if product is None or product[0].requires_grad or (bias is not None and bias.requires_grad):
            return None
        terms: dict[str | None, tuple[LowRank, torch.Tensor | None]] = {}
        parts = []
        for run, layer in zip(acting, cast("list[LowRankLayer]", found), strict=True):
            if run.name not in terms:
                terms[run.name] = layer.term(module), layer.acting_bias(module)
            where = slice(times * run.start, times * run.stop)
            parts.append(Part(where, *terms[run.name], self.random.get(run.name or "")))
        return routed_linear(x, product[0], bias, parts, product[1])

    def _place_of(self, module: HostModule, x: torch.Tensor) -> tuple[int, int]:
        """Which of the input's dimensions counts the rows or tokens, and how often it has each."""
        if self.lengths is None:
            return 0, self._repeats_in(module, x)
        axis = next((i for i, size in enumerate(x.shape) if size != 1), 0) if self.total != 1 else 0
        if x.ndim == 0 or x.shape[axis] != self.total:
            raise InputError(
                f"routed() was given segments of {self.total} tokens, and a {type(module).__name__} sees "
                f"{tuple(x.shape)}",
                fix="Give the model one row of as many tokens as the lengths add up to, without a cache.",
            )
        return axis, 1

    def _repeats_in(self, module: HostModule, x: torch.Tensor) -> int:
        given = len(self.names)
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
        return 1 if len(x) == given else self.repeats


def _several_tensors(module: HostModule) -> InputError:
    return InputError(
        f"a {type(module).__name__} takes or gives more than one tensor, and its rows cannot be routed one by one",
        fix="Run the rows of each adapter as a batch of their own, with lowrank.using.",
    )


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
