"""How the factors start: `init_lora_weights`, one file for each idea.

An initialisation fills `lora_A` and `lora_B` of a layer for a module. Those that begin at the base weight's own
directions also set `start_A` and `start_B`; what these stand for is subtracted, so that the adapted model starts as the
base and the base itself is never changed. A new one is one function and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lowrank.adapters.initialisations.from_shapes import gaussian, kaiming, uniform
from lowrank.adapters.initialisations.loftq import loftq
from lowrank.adapters.initialisations.olora import olora
from lowrank.adapters.initialisations.orthogonal import orthogonal
from lowrank.adapters.initialisations.pissa import pissa
from lowrank.adapters.kinds.kind import HostModule, Kind, groups_of
from lowrank.errors import InputError

if TYPE_CHECKING:
    from lowrank.adapters.methods.lora import LoraLayer

Initialisation = Callable[["LoraLayer", HostModule, Kind], None]

INITIALISATIONS: dict[bool | str, Initialisation] = {
    True: kaiming,
    False: uniform,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "olora": olora,
    "pissa": pissa,
    "loftq": loftq,
    "eva": kaiming,  # A is then set from the data: see eva.py
}

_BY_SHAPE = (True, False, "gaussian")  # those that look at nothing but each factor's own shape


@torch.no_grad()
def initialise(layer: LoraLayer, how: bool | str, module: HostModule, kind: Kind) -> None:
    """Fills the factors of a new layer; see `LoraConfig.init_lora_weights`.

    Raises:
        InputError: the initialisation does not fit this module or its rank.
    """
    if groups_of(module) > 1 and how not in _BY_SHAPE:
        raise InputError(f"init_lora_weights: {how} does not fit a convolution with {groups_of(module)} groups")
    if isinstance(how, str) and how.startswith("pissa_niter_"):
        pissa(layer, module, kind, iterations=int(how.removeprefix("pissa_niter_")))
    else:
        INITIALISATIONS[how](layer, module, kind)
