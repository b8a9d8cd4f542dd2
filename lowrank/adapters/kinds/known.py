"""The kinds of module that are known, and the kind of a module."""

from __future__ import annotations

from lowrank.adapters.kinds.conv import ConvKind
from lowrank.adapters.kinds.embedding import EmbeddingKind
from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.adapters.kinds.linear import Conv1DKind, LinearKind
from lowrank.errors import InputError

KINDS: list[Kind] = [LinearKind(), Conv1DKind(), EmbeddingKind(), ConvKind()]
"""The first that fits a module is its kind."""


def kind_of(module: HostModule) -> Kind | None:
    """The kind of a module, None where no adapter fits."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def register_kind(kind: Kind) -> None:
    """Lets adapters sit on a kind of module of your own; it is asked before those that are known.

    Such a module has a `weight` and a `bias` (None for none). Register its kind in every process that wraps, loads or
    merges it.

    Raises:
        InputError: `kind` lacks something that a `Kind` has.
    """
    asked = {*Kind.__annotations__, *(name for name in vars(Kind) if not name.startswith("_"))}
    if lacking := sorted(name for name in asked if not hasattr(kind, name)):
        raise InputError(f"{type(kind).__name__} is no kind of module: it lacks {', '.join(lacking)}")
    KINDS.insert(0, kind)
