"""An architecture with parameters that take no memory: every one of them is a single zero, expanded to its shape.

An adapter is put in and loaded as into the model itself, and what it stands for can be read off: W = 0 + ΔW.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def hollow(skeleton: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the meta device, on the CPU, with ties as they are."""
    model = copy.deepcopy(skeleton)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(id(parameter), nn.Parameter(_zeros(parameter), requires_grad=False))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model.eval()


def _zeros(like: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """One zero, expanded."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape if shape is None else shape)


def resize(model: PreTrainedModel, name: str, shape: tuple[int, ...]) -> None:
    """Gives a parameter that has a row for each token another number of rows, and the config with it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module._parameters[leaf] = nn.Parameter(_zeros(module.get_parameter(leaf), shape), requires_grad=False)
    for count in ("num_embeddings", "out_features"):
        if hasattr(module, count):
            setattr(module, count, shape[0])
    model.config.get_text_config().vocab_size = shape[0]
