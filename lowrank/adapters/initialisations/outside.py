"""Initialisations that need more than the module: data (EVA) or the weights before quantisation (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from lowrank.adapters.config import AdapterConfig, EvaConfig, LoraConfig
from lowrank.adapters.initialisations.eva import Directions, allocate, input_directions
from lowrank.adapters.initialisations.loftq import correct_quantisation
from lowrank.adapters.kinds.kind import HostModule, kind_of
from lowrank.adapters.methods.layer import rank_and_scale
from lowrank.adapters.methods.lora import LoraLayer
from lowrank.errors import InputError

Batches = Iterable[Mapping[str, torch.Tensor]]
Originals = Callable[[str], torch.Tensor]


class Outside:
    """What `wrap` was given for an initialisation, and what came of it before the layers were built.

    Attributes:
        config: The config to build with: EVA gives modules ranks of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        targets: Mapping[str, nn.Module],
        batches: Batches | None,
        originals: Originals | None,
    ) -> None:
        how = getattr(config, "init_lora_weights", True)
        _check(how == "eva", "eva", "batches", batches)
        _check(how == "loftq", "loftq", "originals", originals)
        self.config, self._originals = config, originals
        self._directions: dict[str, Directions] = {}
        if batches is not None and isinstance(config, LoraConfig):
            self._read(model, config, targets, batches)

    def _read(self, model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module], batches: Batches) -> None:
        rho = (config.eva_config or EvaConfig()).rho
        asked = {path: rank_and_scale(config, path)[0] for path in targets}
        self._directions = input_directions(model, targets, batches, k=int(rho * max(asked.values())))
        ranks = allocate(self._directions, asked, rho)
        # The scale stays the one that was asked for, whatever the rank became.
        alphas = {path: rank_and_scale(config, path)[1] / config.scale(r, 1.0) for path, r in ranks.items()}
        self.config = config.model_copy(
            update={
                "rank_pattern": {path: r for path, r in ranks.items() if r != config.r},
                "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
            }
        )

    @torch.no_grad()
    def fill(self, path: str, module: HostModule, layer: LoraLayer) -> None:
        """Sets the factors of a new layer from what is known of its module."""
        if path in self._directions:
            layer.lora_A.copy_(self._directions[path].vectors[: layer.lora_A.shape[0]])
        if self._originals is not None:
            kind = kind_of(module)
            assert kind is not None
            correct_quantisation(layer, module, kind, self._originals(f"{path}.weight"))


def _check(wanted: bool, name: str, argument: str, given: object) -> None:
    if wanted and given is None:
        raise InputError(f"init_lora_weights: {name} needs `{argument}`", fix=f"Call wrap(..., {argument}=...).")
    if given is not None and not wanted:
        raise InputError(f"`{argument}` is for init_lora_weights: {name}, and the config says otherwise")
