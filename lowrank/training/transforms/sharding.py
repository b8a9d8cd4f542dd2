"""A frozen base, sharded between the processes of a run (FSDP2, Zhao 2023): each layer is gathered when it is used.

Adapters are small and stay whole on every process, as ordinary parameters: optimiser, clipping, checkpoints and saving
do not know of it."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lowrank.adapters.install import AdapterSet
from lowrank.errors import InputError
from lowrank.quantisers.registry import quantiser_of
from lowrank.training.machine.ranks import Ranks
from lowrank.training.transforms.layers import layers_of


def shard(model: PreTrainedModel, ranks: Ranks, device: torch.device) -> None:
    """Shards the base's parameters, layer by layer; what trains moves to the device whole.

    Args:
        model: Adapters in, on the CPU or on the device.
        ranks: The processes that it is sharded between.
        device: Of this process.

    Raises:
        InputError: the model's parameters train themselves, or it does not say what its layers are.
    """
    layers = layers_of(model, "training.fsdp")
    whole = {parameter for name, parameter in model.named_parameters() if _of_adapter(name)}
    if any(parameter.requires_grad for parameter in model.parameters() if parameter not in whole):
        raise InputError(
            "what is sharded is a frozen base, and the base's own parameters train",
            where="training.fsdp",
            fix="Take an adapter (adapter.method), or leave training.fsdp out.",
        )
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if (quantiser := quantiser_of(module)) is not None:
            quantiser.shard(module)
    mesh = init_device_mesh(device.type, (ranks.count,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def _of_adapter(name: str) -> bool:
    return f".{AdapterSet.CHILD}." in f".{name}"
