"""A quantised base as a dense one: what an adapter is merged into."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from lowrank.adapters.install import move
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.modules import named_modules, submodule
from lowrank.adapters.targeting.parameters import make_parameters_dense, quantised_names
from lowrank.quantisers.registry import quantiser_of


def is_quantised(module: nn.Module) -> bool:
    """Whether a quantiser holds its weight, or parameters of its own."""
    return quantiser_of(module) is not None or bool(quantised_names(module))


@torch.no_grad()
def make_dense(model: HostModule, undo: ExitStack) -> None:
    """Replaces each quantised layer by a `torch.nn.Linear` with the weight that it stands for; adapters move over.

    Other modules with quantised parameters (experts) get plain ones. An adapter trained over quantised weights is right
    over those, dequantised; adding it to weights that are then quantised again would lose most of it.

    Args:
        model: All of it, in place.
        undo: Gets what puts the quantised layers back, should anything go wrong before it is emptied.
    """
    dtype = dense_dtype(model)
    for path, module in list(named_modules(model)):
        if quantised_names(module):
            undo.callback(_give_back, module, type(module), module.parametrizations)
            make_parameters_dense(module, dtype)
        elif is_quantised(module):
            dense = dense_twin(module, dtype)
            parent, _, name = path.rpartition(".")
            undo.callback(setattr, submodule(model, parent), name, module)
            undo.callback(move, dense, module)
            move(module, dense)
            setattr(submodule(model, parent), name, dense)


def forget_quantisation(model: HostModule) -> None:
    """What transformers notes on a model whose layers are quantised goes, now that they are not."""
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config


def dense_dtype(model: nn.Module) -> torch.dtype:
    """What the base computes in: the dtype of its first parameter that is in floating point, however it is stored."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def dense_twin(module: HostModule, dtype: torch.dtype) -> nn.Linear:
    """The linear layer that a quantised one stands for."""
    kind = kind_of(module)
    assert kind is not None
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    dense.weight = nn.Parameter(kind.weight(module).to(dtype), requires_grad=False)
    dense.bias = module.bias
    return dense.train(module.training)


def _give_back(module: nn.Module, owner: type, parametrizations: nn.Module) -> None:
    for name in dict(parametrizations.named_children()):
        module._parameters.pop(name, None)
    module.__class__ = owner
    module._modules["parametrizations"] = parametrizations
