"""The objectives by name: each is a file, a line here and one in `objective_kinds.py`."""

from __future__ import annotations

from collections.abc import Callable

from lowrank.training.losses.cpo import Cpo
from lowrank.training.losses.dpo import Dpo
from lowrank.training.losses.ipo import Ipo
from lowrank.training.losses.kto import Kto
from lowrank.training.losses.objective import Numbers, Objective
from lowrank.training.losses.orpo import Orpo
from lowrank.training.losses.simpo import Simpo

OBJECTIVES: dict[str, Callable[[Numbers], Objective]] = {
    "dpo": Dpo,
    "ipo": Ipo,
    "simpo": Simpo,
    "cpo": Cpo,
    "orpo": Orpo,
    "kto": Kto,
}
