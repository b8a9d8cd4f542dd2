"""Which adapters act: switching, stacking, silencing, and one adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lowrank.adapters.copies import WholeCopy
from lowrank.adapters.host import hosts
from lowrank.adapters.record import Record, record_of
from lowrank.errors import InputError


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes one adapter, or several whose deltas add, the active ones; an empty list silences all.

    What trains is not changed by this: parameters keep their `requires_grad`.

    Raises:
        InputError: there is no such adapter, one is named twice, or one would hide another.
    """
    record = record_of(model)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    record.check_known(chosen)
    if len(set(chosen)) < len(chosen):
        raise InputError(f"an adapter is named twice: {', '.join(chosen)}")
    _check_none_hidden(model, chosen)
    record.activity.names = chosen


def _check_none_hidden(model: nn.Module, names: tuple[str, ...]) -> None:
    """A module that one adapter holds whole does not run what another adapts inside of it."""
    if len(names) < 2:
        return
    places = [
        (path, name, layer)
        for path, _, adapters in hosts(model)
        for name, layer in adapters.layers().items()
        if name in names
    ]
    for path, name, layer in places:
        inside = [(other, p) for p, other, _ in places if other != name and p.startswith(f"{path}.")]
        if isinstance(layer, WholeCopy) and inside:
            other, hidden = inside[0]
            raise InputError(
                f"the adapter {name!r} holds {path} whole, and {other!r} adapts {hidden} inside of it: the two cannot "
                "act together",
                fix="Activate one at a time.",
            )


@contextmanager
def using(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """`set_active` for as long as the block lasts."""
    activity = record_of(model).activity
    before = activity.names
    set_active(model, names)
    try:
        yield
    finally:
        activity.names = before


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone, for as long as the block lasts."""
    with using(model, ()):
        yield


@contextmanager
def routed(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Gives every row of the batch an adapter of its own, or none, for as long as the block lasts.

    The base runs once for the whole batch; each adapter that is present adds its delta to its rows. Adapters that are
    loaded and not named cost nothing.
    """
    record = record_of(model)
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    record.check_known(names)
    _check_routable(record, names)
    record.activity.rows = tuple(rows)
    try:
        yield
    finally:
        record.activity.rows = None


def _check_routable(record: Record, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(record.configs[name], "target_parameters", None):
            raise InputError(
                f"the adapter {name!r} adapts experts (target_parameters), where tokens of all rows mix: it cannot be "
                "routed",
                fix="Run the rows of this adapter as a batch of their own, with lowrank.using.",
            )
