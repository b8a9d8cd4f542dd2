"""A base with NaN or infinity in it is told as that, by name; a loss that is not finite for another reason, by module."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import lowrank
from lowrank.errors import InputError, JobError
from lowrank.recipes.check import check
from lowrank.recipes.evaluate import evaluate


def broken(tmp_path, build, name: str, value: float):
    model = build()
    model.get_parameter(name).data.view(-1)[3] = value
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    return {"name_or_path": str(tmp_path / "broken")}


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (tiny_llama, "model.layers.1.mlp.down_proj.weight", float("nan")),
        (tiny_llama, "model.norm.weight", float("inf")),
        (tiny_gpt2, "transformer.h.0.attn.c_attn.weight", float("-inf")),
        (tiny_gpt2, "transformer.h.1.mlp.c_fc.bias", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_named(write_config, tmp_path, build, name, value):
    path = write_config(model=broken(tmp_path, build, name, value))
    for job in (check, lowrank.train, evaluate):
        with pytest.raises(InputError) as raised:
            job(path)
        part = name.rpartition(".")[0].rpartition(".")[2]
        assert "1 of the weights of" in str(raised.value)
        assert "hold NaN or infinity: " in str(raised.value)
        assert part in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_traced_to_a_module(write_config, tmp_path, capsys):
    model = tiny_llama()
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.copy_(weight.sign() * 3e38)  # finite, and its products are not
    model.save_pretrained(tmp_path / "steep")
    tiny_tokenizer().save_pretrained(tmp_path / "steep")
    steep = {"name_or_path": str(tmp_path / "steep")}
    path = write_config(model=steep, data={"packing": False}, training={"eval_on_start": False})
    with pytest.raises(JobError, match="not finite"):
        lowrank.train(path)
    out = capsys.readouterr().out
    assert "the loss of the longest batch is nan: all weights are finite" in out
    assert "the first module whose output is not is model.layers.1." in out
