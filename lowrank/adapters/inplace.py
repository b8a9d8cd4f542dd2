"""Whether the modules that adapters were put on are still there, and as large as they were."""

from __future__ import annotations

from torch import nn

from lowrank.adapters.install import hosts
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.modules import ADAPTERS
from lowrank.adapters.record import record_of
from lowrank.adapters.token_rows import SharedTokens, TokenRows
from lowrank.adapters.whole_modules import WholeCopy
from lowrank.errors import InputError

Sizes = tuple[object, ...] | None


def places_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, dict[str, Sizes]]:
    """For each adapter the modules that carry it, and the sizes of each; None where those may change (single rows)."""
    found: dict[str, dict[str, Sizes]] = {name: {} for name in names}
    for path, module, adapters in hosts(model):
        for name in names:
            if name in adapters:
                found[name][path] = _sizes(module, adapters[name])
    return found


def _sizes(module: HostModule, layer: nn.Module) -> Sizes:
    if isinstance(layer, WholeCopy):
        return tuple(tuple(parameter.shape) for name, parameter in module.named_parameters() if ADAPTERS not in name)
    kind = kind_of(module)
    return None if kind is None or isinstance(layer, TokenRows | SharedTokens) else kind.shape(module)


def check_in_place(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises InputError where a module was replaced or resized after an adapter was put on it.

    A head that `resize_token_embeddings` replaced is a new module: what was trained on the old one would be lost
    without a word, or not fit.
    """
    record = record_of(model)
    for name, now in places_of(model, names).items():
        for path, sizes in record.places.get(name, {}).items():
            if path in now and now[path] == sizes:
                continue
            how = "has another size" if path in now else "was replaced"
            raise InputError(
                f"{path} {how} since the adapter {name!r} was put on it",
                fix="Resize or replace modules before lowrank.wrap or lowrank.load; lowrank.unwrap takes adapters off.",
            )
