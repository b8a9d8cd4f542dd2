"""The repeated layers of a model: what is sharded, compiled or recomputed one by one."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank.adapters.install import bind_for_compiler
from lowrank.errors import InputError


def layers_of(model: Any, where: str) -> list[nn.Module]:
    """The modules that the model itself names as its layers.

    Raises:
        InputError: it names none; `where` is the key that asks for them.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise InputError(f"{type(model).__name__} does not say what its layers are", where=where)
    return layers


def compile_layers(model: Any) -> None:
    """Each layer through torch.compile, for sequences of any length; parameters keep their names.

    Layer by layer, since all are alike: what is compiled once serves them all. Attention over packs looks at the
    segments' lengths and stays outside of what is compiled.
    """
    layers = layers_of(model, "training.torch_compile")
    bind_for_compiler(model)
    for layer in layers:
        layer.compile(dynamic=True)
