"""A quantised base as a dense one: what an adapter is merged into."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.adapters.host import move
from lowrank.adapters.kinds import HostModule, kind_of
from lowrank.adapters.parameters import make_parameters_dense, quantised_names


def is_quantised(module: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' linear layers, or has parameters of its own in 4 bits."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") or bool(quantised_names(module))


@torch.no_grad()
def make_dense(model: HostModule) -> None:
    """Replaces each quantised layer by a `torch.nn.Linear` with the weight that it stands for; adapters move over.

    Other modules with 4-bit parameters (experts) get plain ones.

    An adapter trained over quantised weights is right over those, dequantised; adding it to weights that are then
    quantised again would lose most of it.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for path, module in list(model.named_modules()):
        if quantised_names(module):
            make_parameters_dense(module, dtype)
        elif is_quantised(module):
            kind = kind_of(module)
            assert kind is not None
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            dense.weight = nn.Parameter(kind.weight(module).to(dtype), requires_grad=False)
            dense.bias = module.bias
            dense.train(module.training)
            move(module, dense)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, dense)
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
