"""A state comes back as it was written, to the bit, and is told apart from a damaged one."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank.errors import InputError
from lowrank.training.checkpoints.state import read_state, write_state

STATE = {
    "step": 7,
    "rate": 0.1 + 0.2,
    "none": None,
    "yes": True,
    "text": "tensor:like",
    "nested": {"a": [1, 2.5, {"b": torch.arange(6).view(2, 3)}], "0": torch.tensor(3.5)},
    "scalars": {"x/y": torch.tensor([], dtype=torch.float32), "half": torch.ones(3, dtype=torch.bfloat16)},
    "huge": 2**80 + 1,
}


def test_it_comes_back_to_the_bit(tmp_path):
    write_state(tmp_path, STATE)
    back = read_state(tmp_path)
    assert back["rate"] == STATE["rate"]
    assert back["huge"] == STATE["huge"]
    assert back["text"] == "tensor:like"
    assert back["yes"] is True
    assert back["none"] is None
    assert torch.equal(back["nested"]["a"][2]["b"], STATE["nested"]["a"][2]["b"])
    assert back["nested"]["0"].shape == ()
    assert back["nested"]["0"].item() == 3.5
    assert back["scalars"]["half"].dtype == torch.bfloat16
    assert back["scalars"]["x/y"].shape == (0,)


def test_values_that_are_not_finite_come_back(tmp_path):
    write_state(tmp_path, {"best": math.inf, "worst": -math.inf, "tensor": torch.tensor([math.nan])})
    back = read_state(tmp_path)
    assert back["best"] == math.inf
    assert back["worst"] == -math.inf
    assert back["tensor"].isnan().all()


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_one_is_refused(tmp_path, name):
    write_state(tmp_path, STATE)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=name):
        read_state(tmp_path)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_state(tmp_path / folder, STATE)
    for name in ("state.json", "state.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
