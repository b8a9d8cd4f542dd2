"""What a launcher asks for and a run would not do is refused, not passed over."""

from __future__ import annotations

import pytest

from lowrank.errors import InputError
from lowrank.training.machine import joining
from lowrank.training.machine.joining import join, refuse_half_a_launch
from lowrank.training.machine.launch import refuse_launcher_options

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


WHOLE = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29545"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, and no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, and no WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0", "RANK": "0"}, "and no MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "'two' is no number"),
        ({"WORLD_SIZE": ""}, "'' is no number"),
        ({"RANK": "-1"}, "'-1' is no number"),
        ({**WHOLE, "MASTER_PORT": "x"}, "'x' is no number"),
        ({**WHOLE, "RANK": "4"}, "contradict one another: RANK=4, LOCAL_RANK=0, WORLD_SIZE=4"),
        ({**WHOLE, "LOCAL_RANK": "2"}, "contradict one another"),
    ],
    ids=str,
)
def test_variables_that_a_launcher_has_left_over(given, message):
    with pytest.raises(InputError) as raised:
        refuse_half_a_launch(given)
    assert message in str(raised.value)
    assert f"`unset {next(name for name in WHOLE if name in given)}" in raised.value.fix


@pytest.mark.parametrize(
    "given",
    [{}, {"RANK": "3"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "nowhere"}, {"SLURM_NTASKS": "4"}, WHOLE],
    ids=str,
)
def test_variables_that_mislead_nobody(given):
    refuse_half_a_launch(given)


def test_processes_that_nobody_starts_are_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(joining, "PATIENCE", joining.timedelta(seconds=1))
    with pytest.raises(InputError, match=r"4 processes are to share this run, .* at 127.0.0.1:29545 \(Timed out"):
        join(cuda=False, environment=WHOLE)
