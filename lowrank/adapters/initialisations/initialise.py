"""Every initialisation by its name. A new one is one function from a `Site` to a `Start`, and one line here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowrank.adapters.initialisations.eva import eva
from lowrank.adapters.initialisations.from_shapes import gaussian, kaiming, uniform
from lowrank.adapters.initialisations.loftq import loftq
from lowrank.adapters.initialisations.olora import olora
from lowrank.adapters.initialisations.orthogonal import orthogonal
from lowrank.adapters.initialisations.pissa import pissa
from lowrank.adapters.initialisations.site import Site, Start
from lowrank.adapters.kinds.kind import groups_of
from lowrank.errors import InputError

INITIALISATIONS: dict[bool | str, Callable[[Site], Start]] = {
    True: kaiming,
    False: uniform,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "olora": olora,
    "pissa": pissa,
    "loftq": loftq,
    "eva": eva,
}

_BY_SHAPE = (True, False, "gaussian")  # those that look at nothing but each factor's own shape


@torch.no_grad()
def initialise(how: bool | str, site: Site) -> Start:
    """The factors that `LoraConfig.init_lora_weights` means for a module.

    Raises:
        InputError: the initialisation does not fit this module or its rank.
    """
    if groups_of(site.module) > 1 and how not in _BY_SHAPE:
        raise InputError(f"init_lora_weights: {how} does not fit a convolution with {groups_of(site.module)} groups")
    if isinstance(how, str) and how.startswith("pissa_niter_"):
        return pissa(site, iterations=int(how.removeprefix("pissa_niter_")))
    return INITIALISATIONS[how](site)
