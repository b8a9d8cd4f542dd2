"""What `accelerate launch` asks for through the environment: a run does what its config says, and refuses the rest.

Taken silently, `--gradient_accumulation_steps` would divide the gradients and fp16 would scale them; and what
`Accelerator.prepare` shards, casts or compiles would stay as it is, for a run does not go through it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lowrank.errors import InputError

# variable: values that ask for nothing, the launcher's option, what to do instead
_OPTIONS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        {"1"},
        "--gradient_accumulation_steps",
        "Set training.gradient_accumulation_steps or training.tokens_per_step.",
    ),
    "ACCELERATE_MIXED_PRECISION": (
        {"no"},
        "--mixed_precision",
        "Launch with --mixed_precision no, and set model.dtype: products are in it, and adapters train in float32.",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ({"no"}, "--dynamo_backend", "Set training.torch_compile: true."),
    "ACCELERATE_USE_FSDP": ({"false"}, "--use_fsdp", "Set training.fsdp: true."),
    "ACCELERATE_USE_DEEPSPEED": ({"false"}, "--use_deepspeed", "Set training.fsdp: true to shard the base."),
    "ACCELERATE_USE_MEGATRON_LM": ({"false"}, "--use_megatron_lm", "Set training.fsdp: true to shard the base."),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        {"false"},
        "--use_parallelism_config",
        "Set training.fsdp: true to shard the base.",
    ),
}


def refuse_launcher_options(*, fsdp: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Looks at what a launcher has set for this process.

    Args:
        fsdp: Whether the config shards the base: then the launcher may say so too.
        environment: The variables.

    Raises:
        InputError: it asks for what the config does not say, or for several processes and started one.
    """
    for variable, (neutral, option, fix) in _OPTIONS.items():
        asked = environment.get(variable, "").lower()
        if asked in neutral | {""} or (variable == "ACCELERATE_USE_FSDP" and fsdp):
            continue
        raise InputError(f"the launcher asks for {option} ({asked}), which the config rules", where=variable, fix=fix)
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        raise InputError(
            "accelerate launch was asked for several processes and has started one by itself",
            where="MASTER_PORT",
            fix="Start it with torchrun --nproc_per_node N -m lowrank train CONFIG. If one is what you want, unset "
            "MASTER_PORT.",
        )
