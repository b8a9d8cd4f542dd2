"""Folders that other libraries have quantised: nothing is merged into them or taken out of them."""

from __future__ import annotations

import json
from pathlib import Path

import composite_models
import pytest
from tiny import tiny_llama

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint

QUANTISERS = ("fp8", "fbgemm_fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "hqq", "quanto", None)


@pytest.mark.parametrize("place", ["config", "text_config"])
@pytest.mark.parametrize("method", QUANTISERS)
def test_other_quantisers_are_refused_before_anything_is_written(
    method: str | None, place: str, tmp_path: Path
) -> None:
    make = composite_models.llava if place == "text_config" else tiny_llama
    model = composite_models.tiny(make)
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "other")
    lowrank.save(lowrank.wrap(model, LoraConfig(r=2)), tmp_path / "adapter")
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    part = config["text_config"] if place == "text_config" else config
    part["quantization_config"] = {"quant_method": method} if method else {"bits": 4}
    path.write_text(json.dumps(config))
    named = f"quantised with {method or 'what its config does not name'}"
    verbs = (
        lambda: merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
        lambda: lowrank.extract(tmp_path / "base", tmp_path / "other", r=2, out=tmp_path / "out"),
        lambda: lowrank.extract(tmp_path / "other", tmp_path / "base", r=2, out=tmp_path / "out"),
    )
    for verb in verbs:
        with pytest.raises(InputError, match=named):
            verb()
    assert not (tmp_path / "out").exists()
