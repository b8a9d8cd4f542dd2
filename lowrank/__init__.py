"""lowrank: fine-tune Hugging Face models with low-rank adapters.

The public verbs, and the rooms behind them. Each is loaded when it is first used: `import lowrank` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lowrank.lazily import on_first_use

if TYPE_CHECKING:
    from lowrank.adapters import AdaLoraConfig as AdaLoraConfig
    from lowrank.adapters import LoraConfig as LoraConfig
    from lowrank.adapters import MissConfig as MissConfig
    from lowrank.adapters import VeraConfig as VeraConfig
    from lowrank.adapters import describe as describe
    from lowrank.adapters import disabled as disabled
    from lowrank.adapters import merge as merge
    from lowrank.adapters import routed as routed
    from lowrank.adapters import scaled as scaled
    from lowrank.adapters import set_active as set_active
    from lowrank.adapters import set_scale as set_scale
    from lowrank.adapters import unwrap as unwrap
    from lowrank.adapters import using as using
    from lowrank.attention import segments as segments
    from lowrank.attention import set_attention as set_attention
    from lowrank.recipes.parts.opened import load as load
    from lowrank.recipes.train import train as train
    from lowrank.training.run import Callback as Callback
    from lowrank.weights import compose as compose
    from lowrank.weights import extract as extract
    from lowrank.weights import merge_checkpoint as merge_checkpoint
    from lowrank.weights import save as save
    from lowrank.weights import wrap as wrap

__version__ = "0.1.0"

_ROOMS = ("adapters", "attention", "config", "data", "errors", "models", "ops", "recipes", "training", "weights")

_named, _, __all__ = on_first_use(__name__, __file__)


def __getattr__(name: str) -> object:
    return import_module(f"lowrank.{name}") if name in _ROOMS else _named(name)


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS, "__version__"]
