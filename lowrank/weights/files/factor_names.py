"""Which tensors of an adapter's file are factors, by the names that the methods have for them."""

from __future__ import annotations

from typing import NamedTuple

from lowrank.adapters.registry import factor_names


class FactorName(NamedTuple):
    """A factor's name in a file.

    Attributes:
        path: The module's.
        name: The factor's bare name ("lora_A").
        on_table: Whether it is the name that an embedding's factor has.
    """

    path: str
    name: str
    on_table: bool


def factor_of(name: str) -> FactorName | None:
    """What a tensor's name says, None where it is no factor's."""
    known = factor_names()
    path, _, last = name.rpartition(".")
    if last == "weight":
        path, _, last = path.rpartition(".")
        last = f"{last}.weight"
    factor = known.get(last)
    return None if factor is None or not path else FactorName(path, factor.name, last == factor.on_table)
