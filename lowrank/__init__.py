"""lowrank: fine-tune Hugging Face models with low-rank adapters.

The public verbs, and the rooms behind them. Each is loaded when it is first used: `import lowrank` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank.adapters import AdaLoraConfig as AdaLoraConfig
    from lowrank.adapters import LoraConfig as LoraConfig
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

_HOME = {
    "LoraConfig": "lowrank.adapters",
    "AdaLoraConfig": "lowrank.adapters",
    "describe": "lowrank.adapters",
    "wrap": "lowrank.weights",
    "unwrap": "lowrank.adapters",
    "merge": "lowrank.adapters",
    "scaled": "lowrank.adapters",
    "set_active": "lowrank.adapters",
    "set_scale": "lowrank.adapters",
    "using": "lowrank.adapters",
    "disabled": "lowrank.adapters",
    "routed": "lowrank.adapters",
    "segments": "lowrank.attention",
    "set_attention": "lowrank.attention",
    "train": "lowrank.recipes.train",
    "Callback": "lowrank.training.run",
    "save": "lowrank.weights",
    "compose": "lowrank.weights",
    "extract": "lowrank.weights",
    "load": "lowrank.recipes.parts.opened",
    "merge_checkpoint": "lowrank.weights",
}

_ROOMS = ("adapters", "attention", "config", "data", "errors", "models", "ops", "recipes", "training", "weights")

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return import_module(f"lowrank.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS, "__version__"]
