"""EVA (Paischer 2024): A begins as the directions in which a module's inputs vary most; ranks go where they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowrank.adapters.initialisations.site import Site, Start
from lowrank.adapters.kinds.kind import Kind
from lowrank.adapters.kinds.known import kind_of
from lowrank.errors import InputError

TOKENS = 1024
"""Rows of inputs that one batch gives to one module's decomposition, spread evenly over the batch."""

SPARE = 32
"""Directions carried along beyond the k asked for, since one that is small in this batch may be large in the next."""


@dataclass
class Directions:
    """The leading right singular vectors of all inputs that a module has seen.

    Attributes:
        vectors: (k, in), orthonormal rows.
        values: (k,), the singular values.
        energy: Sum of squares of all inputs: what `values²` is a share of.
    """

    vectors: torch.Tensor
    values: torch.Tensor
    energy: float

    def explained(self) -> torch.Tensor:
        """(k,): the share of the inputs' energy along each direction."""
        return self.values.square() / self.energy


@torch.no_grad()
def input_directions(
    model: nn.Module, targets: Mapping[str, nn.Module], batches: Iterable[Mapping[str, torch.Tensor]], k: int
) -> dict[str, Directions]:
    """The k leading input directions of every target, over `batches` (keyword arguments of the model's forward).

    The decomposition is updated batch by batch (Ross 2008), so what is kept is k vectors a module.
    """
    found: dict[str, Directions] = {}

    def listen(path: str, kind: Kind) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[path] = _updated(found.get(path), _rows(inputs[0], kind.shape(module)[1], path), k + SPARE)

        return hook

    kinds = {path: kind for path, module in targets.items() if (kind := kind_of(module)) is not None}
    handles = [targets[path].register_forward_pre_hook(listen(path, kind)) for path, kind in kinds.items()]
    was_training = model.training
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if unseen := [path for path in targets if path not in found]:
        raise InputError(
            f"init_lora_weights: eva saw no input of {', '.join(unseen)}", fix="Give it at least one batch."
        )
    return found


def _rows(x: torch.Tensor, in_features: int, path: str) -> torch.Tensor:
    if x.shape[-1] != in_features or not x.is_floating_point():
        raise InputError(f"init_lora_weights: eva reads the inputs of linear layers, and {path} is none")
    rows = x.reshape(-1, in_features)
    return rows[:: max(1, rows.shape[0] // TOKENS)].float()


def _updated(known: Directions | None, rows: torch.Tensor, k: int) -> Directions:
    energy = float(rows.square().sum())
    if known is not None:
        rows = torch.cat([known.values[:, None] * known.vectors, rows])
        energy += known.energy
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return Directions(vectors[:k], values[:k], energy)


def eva(site: Site) -> Start:
    """A of the directions that `input_directions` found, B zero."""
    return Start(site.outside.directions[site.path][: site.r], torch.zeros_like(site.B))


def allocate(directions: Mapping[str, Directions], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """Shares the ranks out anew, as many in all, to where a direction explains most; at most rho times a module's own.

    A module that gets none keeps one rank, so that its adapter exists.

    Raises:
        InputError: the inputs have fewer directions than there are ranks.
    """
    budget = sum(ranks.values())
    candidates = [
        (float(share), path)
        for path, found in directions.items()
        for share in found.explained()[: int(rho * ranks[path])]
    ]
    if len(candidates) < budget:
        raise InputError(
            f"init_lora_weights: eva found {len(candidates)} directions in the inputs, for {budget} ranks",
            fix="Give it more or longer batches, or lower r.",
        )
    candidates.sort(key=lambda candidate: -candidate[0])
    given = dict.fromkeys(directions, 0)
    for _, path in candidates[:budget]:
        given[path] += 1
    return {path: max(1, count) for path, count in given.items()}
