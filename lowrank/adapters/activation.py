"""Which adapters act: switching, stacking, silencing, and one adapter for each row of a batch or segment of a pack.

`set_active` is a property of the model, for all threads. `using`, `disabled` and `routed` are blocks: each holds for
the thread that opened it (a thread that is started inside has none, unless it is given a copy of the context:
`contextvars.copy_context().run`), and the innermost one says what acts, but that within `disabled` the base runs alone
whatever is said inside. Gradients may be taken after a block: what is recomputed then is recomputed as it was.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lowrank.adapters.activity import Setting
from lowrank.adapters.inplace import check_in_place
from lowrank.adapters.install import Choice, hosts
from lowrank.adapters.modules import bare
from lowrank.adapters.record import Record, find_record, record_of
from lowrank.adapters.routing import Routing, note_repeats, turning
from lowrank.adapters.together import check_together
from lowrank.attention.announced import ANNOUNCED
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
def routed(
    model: nn.Module,
    names: Sequence[str | None],
    lengths: Sequence[int] | None = None,
    *,
    random: Mapping[str, torch.Generator] | None = None,
) -> Iterator[None]:
    """Gives every row of the batch, or every segment of a pack, an adapter of its own, or none, while the block lasts.

    The base runs once for all; each adapter that is present adds to its own rows or segments. Adapters that are loaded
    and not named cost nothing; rows or segments of one adapter cost least where they lie together. A row that
    `generate` repeats, for beams or several answers, keeps its adapter.

    Args:
        model: A wrapped model, whose modules have the batch in their first dimension.
        names: For each row, or each segment, an adapter's name, or None.
        lengths: Tokens of each segment of one row, in order; None: the names are of rows. What keeps the segments from
            seeing one another is `lowrank.segments`, which may cut them further: a segment there lies in one here, and
            one that goes on from another has its adapter.
        random: What the dropout of an adapter draws from, instead of torch's own generator.

    Raises:
        InputError: an unknown name, not one name for each length, or an adapter on modules in which rows (or tokens)
            mix. While the block lasts, also the forward pass of a module whose input's rows are not the batch's, or
            whose tokens not the segments'.
    """
    model = bare(model)
    record = record_of(model)
    present = tuple(dict.fromkeys(name for name in names if name is not None))
    record.check_known(present)
    _check_lengths(names, lengths)
    check_in_place(model, present)
    _check_routable(model, record, present, by_segment=lengths is not None)
    if hasattr(model, _GENERATION_STEP) and _GENERATION_STEP not in record.patched:
        expand = functools.partial(note_repeats, model, getattr(model, _GENERATION_STEP))
        record.patch(model, _GENERATION_STEP, expand)
    if lengths is None:
        paths = [path for path, _, adapters in hosts(model) if any(name in adapters for name in present)]
        routing, hook = Routing(tuple(names), random=random or {}, turning=turning(model, paths)), None
    else:
        routing = Routing(tuple(names), tuple(lengths), random or {})
        hook = model.register_forward_pre_hook(functools.partial(_check_pack, routing))
    try:
        with _block(record, Choice(routing=routing)):
            yield
    finally:
        if hook is not None:
            hook.remove()


def keep_rows(model: nn.Module, rows: Sequence[int]) -> None:
    """Inside of `routed` by rows: the batch goes on with these of its rows, in this order. Elsewhere nothing.

    A model without adapters has no rows to keep either.
    """
    record = find_record(model)
    routing = None if record is None else record.activity.now.routing
    if routing is not None:
        routing.keep_rows(rows)


def _check_lengths(names: Sequence[str | None], lengths: Sequence[int] | None) -> None:
    if lengths is None:
        return
    if len(names) != len(lengths):
        raise InputError(f"routed() was given {len(names)} names and the lengths of {len(lengths)} segments")
    if bad := [length for length in lengths if length < 0]:
        raise InputError(f"a segment of {bad[0]} tokens was given to routed()")


def _check_pack(routing: Routing, model: Any, args: Any) -> None:
    """Raises InputError where the segments that attention knows are not within those of one adapter, or go on from
    another adapter's."""
    told = ANNOUNCED.get(id(getattr(model, "config", None)))
    if told is None:
        return
    borders, place, owners = iter(routing.runs), 0, []
    run = next(borders, None)
    for number, length in enumerate(told.lengths):
        while run is not None and run.stop <= place:
            run = next(borders, None)
        if run is None or place + length > run.stop:
            raise InputError(
                f"segment {number} of the pack, its tokens {place} to {place + length - 1}, is not within one of the "
                "segments that routed() was given",
                fix="Give routed() the lengths that lowrank.segments was given.",
            )
        owners.append(run.name)
        parent = -1 if told.parents is None else told.parents[number]
        if parent >= 0 and owners[parent] != run.name:
            raise InputError(
                f"segment {number} of the pack has the adapter {run.name!r} and goes on from segment {parent}, which "
                f"has {owners[parent]!r}",
                fix="Give a segment the adapter of the one that it goes on from.",
            )
        place += length


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


def _check_routable(model: Any, record: Record, names: tuple[str, ...], *, by_segment: bool) -> None:
    table = _tokens_of(model)
    for path, module, adapters in hosts(model):
        present = [name for name in names if name in adapters]
        why = _why_mixed(path, module, table)
        if by_segment and isinstance(module, _ConvNd):
            why = "a convolution, in which neighbouring tokens mix"
        if present and why is not None:
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
