"""Whether an extracted adapter is what it shall be: loaded into the architecture, and compared with the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.install import hosts
from lowrank.adapters.whole_modules import WholeCopy
from lowrank.errors import JobError
from lowrank.weights.arithmetic.carriers import Carriers
from lowrank.weights.arithmetic.pairs import Pair
from lowrank.weights.files.adapter_file import shorten
from lowrank.weights.files.hollow import hollow, resize
from lowrank.weights.files.saving import load

_SLACK = 1e-3  # of ‖ΔW‖: float32 sums; a factor's dtype adds its own rounding


@torch.no_grad()
def prove(folder: Path, pair: Pair, found: Carriers) -> int:
    """Loads the adapter, and compares every tensor that it changes with the difference of the two models.

    Factors must give the difference but for what their rank leaves out; what is saved whole must be the tuned model's
    own values. Both are read from the files again.

    Returns:
        How many tensors that differ were found.

    Raises:
        InputError: Loading refuses the adapter.
        JobError: A tensor that differs is not in it, or comes out otherwise.
    """
    model = hollow(pair.base.skeleton)
    for name in found.resized:
        resize(model, name, pair.shapes(name)[1])
    load(model, folder, adapter="proof")
    proved: set[str] = set()
    for path, module, adapters in hosts(model):
        layer: Any = adapters["proof"]
        if isinstance(layer, WholeCopy):
            proved |= _compare_whole(path, layer, pair)
        else:
            proved |= _compare_merged(path, module, layer, pair, found)
    absent = [name for name in found.differing if name not in proved]
    if absent:
        raise JobError(f"the adapter does not change {shorten(absent)}, and the tuned model does")
    return len(found.differing)


def _compare_whole(path: str, layer: WholeCopy, pair: Pair) -> set[str]:
    names = set()
    for leaf, tensor in layer.module.state_dict().items():
        name = f"{path}.{leaf}"
        if not torch.equal(tensor, pair.read_after(name).to(tensor.dtype)):
            raise JobError(f"the adapter's {name} is not the tuned model's")
        names.add(name)
    return names


def _compare_merged(path: str, module: Any, layer: Any, pair: Pair, found: Carriers) -> set[str]:
    """Merged into zeros, a layer's factors give ΔW itself, and its bias the bias."""
    before = dict(module._parameters)
    layer.merge_into(module)
    names = set()
    for leaf, parameter in module._parameters.items():
        if parameter is before[leaf] or parameter is None:
            continue
        name = f"{path}.{leaf}"
        if leaf == "bias":
            if not torch.equal(parameter, pair.read_after(name).to(parameter.dtype)):
                raise JobError(f"the adapter's {name} is not the tuned model's")
        else:
            _check_difference(name, parameter, pair, found)
        names.add(name)
    module._parameters.update(before)
    return names


def _check_difference(name: str, written: torch.Tensor, pair: Pair, found: Carriers) -> None:
    one, other = pair.read(name)
    difference = other.sub_(one) if other.data_ptr() != one.data_ptr() else other - one
    size = torch.linalg.vector_norm(difference, dtype=torch.float64).item()
    error = torch.linalg.vector_norm(difference - written, dtype=torch.float64).item()
    kept, whole = found.energies.get(name, found.energies.get(name.rpartition(".")[0], (0.0, size**2)))
    allowed = max(0.0, whole - kept) ** 0.5 + (_SLACK + 4 * torch.finfo(found.dtype).eps) * size
    if not error <= allowed:
        raise JobError(
            f"the adapter's term on {name} is {error / max(size, 1e-30):.1%} off the difference of the models, and its "
            f"rank explains {max(0.0, whole - kept) ** 0.5 / max(size, 1e-30):.1%}"
        )
