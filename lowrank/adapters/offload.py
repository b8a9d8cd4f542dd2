"""Bases whose weights are elsewhere while nothing runs: accelerate's offloading to the CPU or the disk, `meta`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.modules import named_modules
from lowrank.errors import InputError


def _is_away(module: nn.Module) -> bool:
    """Whether a parameter of its own has no values now."""
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


@contextmanager
def weights_here(module: HostModule) -> Iterator[None]:
    """The module's own weights, fetched for as long as the block lasts to where it computes."""
    if not _is_away(module):
        yield
        return
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, None)


def refuse_offloaded(path: str, module: nn.Module, what: str) -> None:
    """Raises InputError where something beneath a module has no values now."""
    if any(_is_away(inner) for inner in module.modules()):
        raise InputError(
            f"{path} is offloaded, and cannot be {what}",
            fix="Load the model without offloading (device_map), or merge on disk: lowrank merge.",
        )


def refuse_empty(model: nn.Module) -> None:
    """Raises InputError for a model whose weights are on `meta`, and nothing brings them."""
    for path, module in named_modules(model):
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if _is_away(module) and not any(getattr(each, "offload", False) for each in hooks):
            raise InputError(
                f"the weights of {path or type(model).__name__} are on the device 'meta': they have no values",
                fix="Load the weights first (from_pretrained).",
            )
