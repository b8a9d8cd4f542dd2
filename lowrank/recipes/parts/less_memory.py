"""What a run could do with less memory for: told with its own numbers where there is not enough."""

from __future__ import annotations

from lowrank.adapters.registry import METHODS
from lowrank.config import RunConfig


def less_to_load(config: RunConfig) -> list[str]:
    """Where the base does not fit: what to try, the first thing first."""
    found = [] if config.quantization is not None else ["quantization.load_in_4bit: true"]
    training = config.training
    if config.adapter.method in METHODS and not (config.quantization or training.fsdp or training.torch_compile):
        found += [] if training.offload == "layers" else ["training.offload: layers"]
    if not training.fsdp:
        found.append("several processes with training.fsdp: true")
    return [*found, f"a smaller base than {config.model.name_or_path}"]


def less_to_train(config: RunConfig) -> list[str]:
    """Where a step does not fit."""
    training = config.training
    if config.data.packing:
        tokens = training.tokens_per_batch or config.data.max_length
        less = f"training.tokens_per_batch below {tokens:,} (data.max_length is {config.data.max_length:,})"
    else:
        less = f"training.per_device_train_batch_size below {training.per_device_train_batch_size}"
    found = [less]
    if not training.gradient_checkpointing:
        found.append("training.gradient_checkpointing: true")
    if config.quantization is None:
        found.append("quantization.load_in_4bit: true")
    return found
