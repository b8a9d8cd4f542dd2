"""What a launcher asks for and a run would not do is refused, not passed over."""

from __future__ import annotations

import pytest

from lowrank.errors import InputError
from lowrank.training.launch import refuse_launcher_options

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}


@pytest.mark.parametrize(
    ("variable", "value", "instead"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.gradient_accumulation_steps"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "model.dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "training.torch_compile"),
        ("ACCELERATE_USE_FSDP", "true", "training.fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "training.fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "training.fsdp"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "training.fsdp"),
    ],
)
def test_options_that_the_config_rules(variable, value, instead):
    with pytest.raises(InputError, match=instead) as raised:
        refuse_launcher_options(fsdp=False, environment={**LAUNCHED, variable: value})
    assert raised.value.where == variable


def test_a_launcher_that_starts_one_process_for_several():
    with pytest.raises(InputError, match="asked for several processes and has started one"):
        refuse_launcher_options(fsdp=False, environment={**LAUNCHED, "MASTER_PORT": "29500"})


def test_what_asks_for_nothing_passes():
    refuse_launcher_options(fsdp=False, environment={})
    refuse_launcher_options(fsdp=False, environment=LAUNCHED)
    refuse_launcher_options(fsdp=False, environment={"MASTER_PORT": "29500"})
    refuse_launcher_options(fsdp=False, environment={**LAUNCHED, "MASTER_PORT": "29500", "WORLD_SIZE": "2"})
    refuse_launcher_options(fsdp=True, environment={**LAUNCHED, "ACCELERATE_USE_FSDP": "true"})
