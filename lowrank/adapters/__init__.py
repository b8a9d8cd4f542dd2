"""The model-patching layer: adapters go into named modules of a model in place, and come out again."""

from __future__ import annotations

import sys
from types import ModuleType

from torch import nn

from lowrank.adapters.activation import disabled as disabled
from lowrank.adapters.activation import routed as routed
from lowrank.adapters.activation import set_active as set_active
from lowrank.adapters.activation import using as using
from lowrank.adapters.adalora_budget import RankBudget as RankBudget
from lowrank.adapters.adalora_budget import orthogonality as orthogonality
from lowrank.adapters.config import AdaLoraConfig as AdaLoraConfig
from lowrank.adapters.config import AdapterConfig as AdapterConfig
from lowrank.adapters.config import LoraConfig as LoraConfig
from lowrank.adapters.conversion import as_lora as as_lora
from lowrank.adapters.conversion import portable as portable
from lowrank.adapters.inspection import AdapterInfo as AdapterInfo
from lowrank.adapters.inspection import adapter_tensors as adapter_tensors
from lowrank.adapters.inspection import config_of as config_of
from lowrank.adapters.inspection import describe as describe
from lowrank.adapters.merging import merge as merge
from lowrank.adapters.registry import METHODS as METHODS
from lowrank.adapters.wrapping import delete as delete
from lowrank.adapters.wrapping import rename as rename
from lowrank.adapters.wrapping import unwrap as unwrap
from lowrank.adapters.wrapping import wrap as wrap
from lowrank.ops.low_rank import LowRank as LowRank


class _Room(ModuleType):
    """`lowrank.adapters` is this package and a verb of the public API: calling the package describes a model."""

    def __call__(self, model: nn.Module) -> dict[str, AdapterInfo]:
        return describe(model)


sys.modules[__name__].__class__ = _Room
