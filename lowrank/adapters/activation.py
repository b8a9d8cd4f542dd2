"""Which adapters act: switching, stacking, silencing, and one adapter for each row of a batch.

`set_active` is a property of the model, for all threads. `using`, `disabled` and `routed` are blocks: each holds for
the thread that opened it (a thread that is started inside has none, unless it is given a copy of the context:
`contextvars.copy_context().run`), and the innermost one says what acts, but that within `disabled` the base runs alone
whatever is said inside. Gradients may be taken after a block: what is recomputed then is recomputed as it was.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowrank.adapters.activity import Setting
from lowrank.adapters.inplace import check_in_place
from lowrank.adapters.install import Choice, hosts
from lowrank.adapters.modules import bare
from lowrank.adapters.record import Record, record_of
from lowrank.adapters.routing import Routing, note_repeats, turning
from lowrank.adapters.together import check_together
from lowrank.errors import InputError

_GENERATION_STEP = "_expand_inputs_for_generation"
"""Where transformers' `generate` repeats rows."""


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes one adapter, or several whose deltas add, the active ones; an empty list silences all.

    What trains is not changed by this: parameters keep their `requires_grad`. Inside a block (`using`, ...) it is what
    holds after the block.

    Raises:
        InputError: there is no such adapter, one is named twice, or two cannot act together.
    """
    record_of(model).activity.names = _chosen(model, names)


@contextmanager
def using(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """These adapters act for as long as the block lasts, in this thread."""
    with _block(record_of(model), Choice(_chosen(model, names))):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone, for as long as the block lasts, whatever blocks are around it and inside of it."""
    with _block(record_of(model), Choice(silent=True)):
        yield


@contextmanager
def routed(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Gives every row of the batch an adapter of its own, or none, for as long as the block lasts.

    The base runs once for the whole batch; each adapter that is present adds its delta to its rows. Adapters that are
    loaded and not named cost nothing. A row that `generate` repeats, for beams or several answers, keeps its adapter.

    Args:
        model: A wrapped model, whose modules have the batch in their first dimension.
        rows: For each row an adapter's name, or None.

    Raises:
        InputError: an unknown name, or an adapter on modules in which rows mix. While the block lasts, also the forward
            pass of a module whose input's rows are not the batch's.
    """
    model = bare(model)
    record = record_of(model)
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    record.check_known(names)
    check_in_place(model, names)
    paths = [path for path, _, adapters in hosts(model) if any(name in adapters for name in names)]
    _check_routable(model, record, names)
    if hasattr(model, _GENERATION_STEP) and _GENERATION_STEP not in record.patched:
        expand = functools.partial(note_repeats, model, getattr(model, _GENERATION_STEP))
        record.patch(model, _GENERATION_STEP, expand)
    with _block(record, Choice(routing=Routing(tuple(rows), turning(model, paths)))):
        yield


def set_scale(model: nn.Module, adapter: str, factor: float) -> None:
    """Multiplies what an adapter adds: with `factor` 0.5 it acts half as strongly as trained, with 1 as trained.

    Of every method it is s of ΔW = s · B · A that is multiplied (under DoRA the direction turns less or more, and the
    magnitude stays). Whole modules, biases and single tokens, which replace the base's, stay as they are trained.
    `merge` merges what acts; `save` multiplies the factor into the file's lora_alpha. Inside of a `scaled` block it is
    what holds after the block.

    Raises:
        InputError: there is no such adapter, or the factor is not finite.
    """
    _strength(model, adapter, factor).value = float(factor)


@contextmanager
def scaled(model: nn.Module, adapter: str, factor: float) -> Iterator[None]:
    """`set_scale` for as long as the block lasts, in this thread."""
    with _strength(model, adapter, factor).block(float(factor)):
        yield


def _strength(model: nn.Module, adapter: str, factor: float) -> Setting[float]:
    record = record_of(model)
    record.check_known((adapter,))
    if not math.isfinite(factor):
        raise InputError(f"an adapter cannot be scaled by {factor}")
    return record.strengths[adapter]


def _block(record: Record, choice: Choice) -> Any:
    now = record.activity.now
    return record.activity.block(now if now.silent else choice)


def _chosen(model: nn.Module, names: str | Sequence[str]) -> tuple[str, ...]:
    chosen = (names,) if isinstance(names, str) else tuple(names)
    record_of(model).check_known(chosen)
    check_in_place(model, chosen)
    if len(set(chosen)) < len(chosen):
        raise InputError(f"an adapter is named twice: {', '.join(chosen)}")
    check_together(model, chosen)
    return chosen


def _check_routable(model: Any, record: Record, names: tuple[str, ...]) -> None:
    table = _tokens_of(model)
    for path, module, adapters in hosts(model):
        present = [name for name in names if name in adapters]
        if present and (why := _why_mixed(path, module, table)) is not None:
            raise InputError(
                f"the adapter {present[0]!r} cannot be routed: it adapts {path}, {why}",
                fix="Run the rows of this adapter as a batch of their own, with lowrank.using.",
            )
    for name in names:
        if getattr(record.configs[name], "target_parameters", None):
            raise InputError(
                f"the adapter {name!r} adapts experts (target_parameters), where tokens of all rows mix: it cannot be "
                "routed",
                fix="Run the rows of this adapter as a batch of their own, with lowrank.using.",
            )


def _tokens_of(model: Any) -> int | None:
    """How many rows the table of the model's tokens has."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def _why_mixed(path: str, module: nn.Module, tokens: int | None) -> str | None:
    if any(re.search(r"(^|_)experts?(_|$)", part) and "shared" not in part for part in path.split(".")):
        return "an expert, where tokens of all rows mix"
    if isinstance(module, nn.Embedding) and tokens is not None and module.num_embeddings != tokens:
        return "a table that is not looked up with the rows' tokens"
    return None
