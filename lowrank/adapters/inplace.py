"""Whether the modules that adapters were put on are still there, and as large as they were."""

from __future__ import annotations

from torch import nn

from lowrank.adapters.host import hosts
from lowrank.adapters.record import record_of
from lowrank.adapters.tokens import SharedTokens, TokenRows
from lowrank.errors import InputError

Sizes = tuple[int, int] | None


def places_of(model: nn.Module, adapter: str) -> dict[str, Sizes]:
    """The modules that carry an adapter, and (out, in) of each; None where that says nothing (single rows, blocks)."""
    places: dict[str, Sizes] = {}
    for path, module, adapters in hosts(model):
        if adapter in adapters:
            by_row = isinstance(adapters[adapter], TokenRows | SharedTokens)
            places[path] = None if adapters.kind is None or by_row else adapters.kind.shape(module)
    return places


def check_in_place(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises InputError where a module was replaced or resized after an adapter was put on it.

    A head that `resize_token_embeddings` replaced is a new module: what was trained on the old one would be lost
    without a word, or not fit.
    """
    record = record_of(model)
    for name in names:
        now = places_of(model, name)
        for path, sizes in record.places.get(name, {}).items():
            if path in now and now[path] == sizes:
                continue
            how = f"was {sizes} and is {now[path]} now" if path in now else "was replaced"
            raise InputError(
                f"{path} {how}, after the adapter {name!r} was put on it",
                fix="Resize or replace modules before lowrank.wrap or lowrank.load; lowrank.unwrap takes adapters off.",
            )
