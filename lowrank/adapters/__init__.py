"""The model-patching layer: adapters go into named modules of a model in place, and come out again.

Names are loaded when they are first used: reading a config needs the fields of an adapter, and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.lazily import on_first_use

if TYPE_CHECKING:
    from lowrank.adapters.activation import disabled as disabled
    from lowrank.adapters.activation import routed as routed
    from lowrank.adapters.activation import scaled as scaled
    from lowrank.adapters.activation import set_active as set_active
    from lowrank.adapters.activation import set_scale as set_scale
    from lowrank.adapters.activation import using as using
    from lowrank.adapters.companions import RankBudget as RankBudget
    from lowrank.adapters.companions import companion as companion
    from lowrank.adapters.companions import orthogonality as orthogonality
    from lowrank.adapters.config import AdapterConfig as AdapterConfig
    from lowrank.adapters.conversion import as_lora as as_lora
    from lowrank.adapters.conversion import portable as portable
    from lowrank.adapters.inspection import AdapterInfo as AdapterInfo
    from lowrank.adapters.inspection import adapter_tensors as adapter_tensors
    from lowrank.adapters.inspection import config_of as config_of
    from lowrank.adapters.inspection import describe as describe
    from lowrank.adapters.kinds.known import register_kind as register_kind
    from lowrank.adapters.merging import merge as merge
    from lowrank.adapters.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from lowrank.adapters.methods.lora import LoraConfig as LoraConfig
    from lowrank.adapters.methods.miss import MissConfig as MissConfig
    from lowrank.adapters.methods.vera import VeraConfig as VeraConfig
    from lowrank.adapters.registry import METHODS as METHODS
    from lowrank.adapters.registry import method_of as method_of
    from lowrank.adapters.wrapping import delete as delete
    from lowrank.adapters.wrapping import rename as rename
    from lowrank.adapters.wrapping import unwrap as unwrap
    from lowrank.adapters.wrapping import wrap as wrap
    from lowrank.ops.low_rank import LowRank as LowRank

__getattr__, __dir__, __all__ = on_first_use(__name__, __file__)
