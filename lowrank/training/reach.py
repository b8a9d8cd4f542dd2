"""The proof that what trains is reached: one backward pass gives every tensor of an adapter a gradient."""

from __future__ import annotations

import re

from torch import nn

from lowrank.errors import InputError

_SHOWN = 8


def unreached(model: nn.Module) -> list[str]:
    """The trainable tensors of adapters that a backward pass has given no gradient, by name.

    A gradient of zeros is one: A's is zero while B is. An expert that no token came to is left out, as long as another
    one of its kind got a gradient.
    """
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad and ".adapters." in name}
    reached = {_of_all_experts(name) for name, p in tensors.items() if p.grad is not None}
    return [name for name, p in tensors.items() if p.grad is None and not _beside(name, reached)]


def refuse_unreached(names: list[str]) -> None:
    """Raises InputError for tensors that no gradient reaches: they would be saved as they began."""
    if not names:
        return
    modules = list(dict.fromkeys(name.partition(".adapters.")[0] for name in names))
    told = ", ".join(modules[:_SHOWN]) + (f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else "")
    raise InputError(
        f"the adapter's tensors on {told} get no gradient: nothing that the loss is computed from runs through them",
        where="adapter",
        fix="Leave these modules out (adapter.exclude_modules, modules_to_save).",
    )


def _of_all_experts(name: str) -> str:
    return re.sub(r"(experts?)\.\d+\.", r"\1.*.", name)


def _beside(name: str, reached: set[str]) -> bool:
    whole = _of_all_experts(name)
    return whole != name and whole in reached
