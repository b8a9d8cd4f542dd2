"""A run over a quantised base, from its config to a merged model."""

from __future__ import annotations

import pytest
import torch
import transformers

import lowrank
from lowrank.recipes.check import check
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.info import show_info
from lowrank.recipes.merge import merge_adapter
from lowrank.recipes.parts.opened import open_model


def test_torchao(write_config, capsys):
    path = write_config(quantization={"quant_method": "torchao", "bits": 8})
    check(path)
    assert "base in 8 bits by torchao" in capsys.readouterr().out
    result = lowrank.train(path)
    assert result.after.loss < result.before.loss
    assert evaluate(path, adapter=result.output_dir).loss == pytest.approx(result.after.loss, rel=1e-6)
    capsys.readouterr()
    show_info(result.output_dir)
    assert "torchao" in capsys.readouterr().out
    merge_adapter(result.output_dir, "merged", verify="answers")
    ids = torch.arange(3, 40)[None]
    model, _ = open_model(str(result.output_dir))
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(merged(ids).logits, model.to("cpu")(ids).logits, rtol=1e-4, atol=1e-4)
