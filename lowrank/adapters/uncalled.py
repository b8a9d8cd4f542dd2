"""Modules that hold a weight which others read without calling them: an adapter there would act on nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from torch import nn

from lowrank.errors import InputError

_MIXERS = re.compile("Mamba|Bamba|FalconH1")


def reader_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """What reads the weight of the module at `path` past its forward; None where the module is called.

    Two cases are known in transformers: the mixers of Mamba and its kin, whose kernels take the weights of projections,
    and the `shared` table of encoder-decoders, which only lends its weight to the two embeddings.

    Args:
        path: The module's path.
        modules: All modules of the model by path, each once.
    """
    parent, _, name = path.rpartition(".")
    owner = type(modules[parent]) if parent in modules else None
    if owner is not None and _MIXERS.search(owner.__name__) and f"self.{name}.weight" in inspect.getsource(owner):
        return owner.__name__
    if name == "shared" and isinstance(modules[path], nn.Embedding):
        lent = f"{parent}.encoder.embed_tokens".lstrip(".")
        return lent if lent in modules else None
    return None


def check_called(path: str, modules: Mapping[str, nn.Module]) -> None:
    """Raises InputError for a module whose weight is read past its forward."""
    if reader := reader_of(path, modules):
        raise InputError(
            f"an adapter on {path} would act on nothing: {reader} reads its weight and does not call it",
            fix="Name the modules that are called (embed_tokens, in_proj) and leave this one out.",
        )
