"""Which way round a file has the factors of fused experts: peft turned them about in 0.19.

Today A (experts·r, in) and B (out, experts·r) stand for W (experts, out, in), unless the module says that its stacks
are transposed. Before, they stood for (experts, in, out) always. Where W is square, only the version tells.
"""

from __future__ import annotations

import torch
from torch import nn

from lowrank.adapters.experts.fused import ExpertsLayer, is_transposed, name_in_file
from lowrank.adapters.install import hosts
from lowrank.adapters.targeting.parameters import parameter_names
from lowrank.weights.files.adapter_file import AdapterFile


def is_turned(
    shape: tuple[int, ...], transposed: bool, rows: int, found: tuple[tuple[int, ...], tuple[int, ...]], before: bool
) -> bool | None:
    """Whether a parameter's factors are for (experts, in, out); None where they are for neither.

    Args:
        shape: The parameter's.
        transposed: Whether its module says that it is so.
        rows: experts · r.
        found: The shapes of A and B in the file.
        before: Whether a peft wrote the file that went by the older way.
    """
    if len(shape) == 2:
        return False if found == ((rows, shape[1]), (shape[0], rows)) else None
    _, first, second = shape
    for turned in (True, False) if transposed or before else (False, True):
        out, into = (second, first) if turned else (first, second)
        if found == ((rows, into), (out, rows)):
            return turned
    return None


def _turned_about(A: torch.Tensor, B: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same ΔW of each expert, for a W that is laid out the other way round."""
    of_expert_A = A.view(experts, -1, A.shape[1])  # (experts, r, in)
    of_expert_B = B.view(B.shape[0], -1, experts)  # (out, r, experts)
    new_A = of_expert_B.permute(2, 1, 0).reshape(-1, B.shape[0])
    new_B = of_expert_A.permute(2, 1, 0).reshape(A.shape[1], -1)
    return new_A, new_B


def turned_experts(model: nn.Module, adapter: str, file: AdapterFile) -> dict[str, torch.Tensor]:
    """The factors of fused experts that a file holds the older way, as the model has them, by name in the file."""
    found: dict[str, torch.Tensor] = {}
    for path, module, adapters in hosts(model) if file.before_turn else ():
        layer = adapters.layers().get(adapter)
        if not isinstance(layer, ExpertsLayer):
            continue
        names = [name for name in parameter_names(module) if name in layer]
        for name in names:
            nested = f"{path}.{name_in_file(names, name)}"
            name_A, name_B = f"{nested}lora_A.weight", f"{nested}lora_B.weight"
            shape = tuple(getattr(module, name).shape)
            if is_transposed(module) or len(shape) != 3 or not {name_A, name_B} <= file.tensors.keys():
                continue
            A, B = file.read(name_A), file.read(name_B)
            if is_turned(shape, False, A.shape[0], (tuple(A.shape), tuple(B.shape)), before=True):
                found[name_A], found[name_B] = _turned_about(A, B, shape[0])
    return found
