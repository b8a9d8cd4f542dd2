"""A run under `training.deterministic`: with such kernels from its first product to its last, and kept when resumed."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank import Callback
from lowrank.config import load_config
from lowrank.errors import InputError
from lowrank.recipes.check import check

ADAPTER = "adapter_model.safetensors"
ON = "training.deterministic=true"


class _Looks(Callback):
    """At every step."""

    def __init__(self, stop_at: int = -1) -> None:
        self.found: list[bool] = []
        self._stop_at = stop_at

    def on_step_end(self, run, metrics):
        self.found.append(torch.are_deterministic_algorithms_enabled())
        run.stop |= run.step == self._stop_at


def test_lasts_as_long_as_the_run_and_changes_nothing_on_a_cpu(write_config):
    looks = _Looks()
    plain = lowrank.train(write_config("plain.yaml", training={"output_dir": "plain"}))
    result = lowrank.train(write_config(), [ON], callbacks=[looks])
    assert looks.found == [True] * result.steps
    assert not torch.are_deterministic_algorithms_enabled()
    assert (result.output_dir / ADAPTER).read_bytes() == (plain.output_dir / ADAPTER).read_bytes()


def test_a_run_is_resumed_as_it_began(write_config):
    path = write_config()
    lowrank.train(path, [ON], callbacks=[_Looks(stop_at=1)])
    assert load_config("out/config.yaml").training.deterministic
    with pytest.raises(InputError, match=r"training\.deterministic: true, now false"):
        lowrank.train(path, resume=True)
    looks = _Looks()
    lowrank.train(path, [ON], resume=True, callbacks=[looks])
    assert set(looks.found) == {True}


def test_what_has_no_such_kernel_is_found_by_check(write_config, monkeypatch):
    def loses(*arguments):
        return torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr("lowrank.recipes.check.estimate_memory", loses)
    path = write_config()
    with pytest.raises(InputError, match="put_ does not have a deterministic implementation"):
        check(path, [ON])
