"""Which adapters can act together, and be merged together: those that do not replace what another one changes."""

from __future__ import annotations

from itertools import combinations

from torch import nn

from lowrank.adapters.install import hosts
from lowrank.adapters.methods.layer import JointLayer, Layer
from lowrank.adapters.token_rows import SharedTokens, TokenRows
from lowrank.adapters.whole_modules import WholeCopy
from lowrank.errors import InputError


def check_together(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises InputError for adapters of which one would hide, or replace, what another does."""
    if len(names) < 2:
        return
    acting = [
        (path, {name: layer for name, layer in adapters.layers().items() if name in names})
        for path, _, adapters in hosts(model)
    ]
    for path, layers in acting:
        for name in (name for name, layer in layers.items() if isinstance(layer, WholeCopy)):
            for inner, others in acting:
                if inner.startswith(f"{path}.") and (other := next((n for n in others if n != name), None)) is not None:
                    raise _refusal(name, f"holds {path} whole", other, f"adapts {inner} inside of it")
        for (name, layer), (other, beside) in combinations(layers.items(), 2):
            if (why := _clash(layer, beside)) is not None:
                raise _refusal(name, f"{why[0]} {path}", other, why[1])


def _clash(first: Layer, second: Layer) -> tuple[str, str] | None:
    """What each of two adapters does to one module, where the two exclude one another."""
    if isinstance(first, WholeCopy):
        return "trains a copy of the whole of", "changes it too"
    if isinstance(second, WholeCopy):
        return "changes", "trains a copy of the whole of it"
    if (ours := _tokens(first)) is not None and (theirs := _tokens(second)) is not None:
        shared = sorted(ours & theirs)
        return (f"trains the tokens {shared} of", "trains them too") if shared else None
    if isinstance(first, JointLayer) != isinstance(second, JointLayer):
        return "changes", "changes it too, the one in its parameters and the other not"
    return None


def _tokens(layer: Layer) -> set[int] | None:
    """Those that the layer trains here, itself or by a module that this one is tied to."""
    rows = layer.rows if isinstance(layer, SharedTokens) else layer
    return set(rows.tokens.tolist()) if isinstance(rows, TokenRows) else None


def _refusal(name: str, does: str, other: str, also: str) -> InputError:
    return InputError(
        f"the adapter {name!r} {does}, and {other!r} {also}: the two cannot act together",
        fix="Activate, or merge, one of them.",
    )
