"""The methods by name: one line each.

Whoever must know what a config, a tensor's name or a file's `peft_type` means asks here. A method of your own goes in
from Python, `METHODS["mine"] = Mine()`, before anything that names it is read.
"""

from __future__ import annotations

from functools import lru_cache

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.methods.adalora import AdaLora
from lowrank.adapters.methods.dora import Dora
from lowrank.adapters.methods.lora import Lora
from lowrank.adapters.methods.method import Method
from lowrank.adapters.methods.miss import Miss
from lowrank.adapters.methods.vera import Vera

METHODS: dict[str, Method] = {
    "lora": Lora(),
    "dora": Dora(),
    "adalora": AdaLora(),
    "miss": Miss(),
    "vera": Vera(),
}


def method_of(config: AdapterConfig) -> Method:
    """The method that a config is of."""
    return METHODS[config.method_name]


def methods_of_type(peft_type: object) -> list[Method]:
    """Those whose files bear that `peft_type`; a file that says no more is read by the first."""
    return [method for method in METHODS.values() if method.peft_type == peft_type]


def shared_names() -> set[str]:
    """What any method's tensors are called that all modules of an adapter have in common."""
    return {name for method in METHODS.values() for name in method.shared}


def factor_names() -> dict[str, Factor]:
    """What any method's tensors are called in files after a module's path, with and without ".weight"."""
    return _factor_names(tuple(METHODS.values()))


@lru_cache(1)
def _factor_names(methods: tuple[Method, ...]) -> dict[str, Factor]:
    factors = [factor for method in methods for factor in method.factors]
    named = {name: factor for factor in factors for name in (factor.in_file, factor.on_table or factor.in_file)}
    return named | {f"{factor.name}{end}": factor for factor in factors for end in ("", ".weight")}
