"""Why a loss is not finite: a weight that is not, or the first module whose output is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank.errors import InputError

_SHOWN = 5


def refuse_broken_weights(model: nn.Module, name: str) -> None:
    """Looks at every weight; for when something is wrong, for it reads all of them.

    Args:
        model: With its weights.
        name: Of the base.

    Raises:
        InputError: some hold NaN or infinity; they are named.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    broken = [path for path, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise InputError(
            f"{len(broken)} of the weights of {name} hold NaN or infinity: {', '.join(broken[:_SHOWN])}{more}",
            where="model.name_or_path",
            fix="Nothing can be learned on it: fetch or make that base anew.",
        )


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs the model once, and says which module's output is the first that holds NaN or infinity; None: none does."""
    found: list[str] = []

    def look(path: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in _tensors(output)}
                found.append(f"{path or 'the model'} ({type(module).__name__}, {', '.join(sorted(dtypes))})")

        return hook

    handles = [module.register_forward_hook(look(path, module)) for path, module in model.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
