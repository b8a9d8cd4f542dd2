"""Bases quantised by libraries that have no file of their own here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.errors import InputError
from lowrank.models import load_model

_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_GROUP = 32


@pytest.fixture
def published(tmp_path):
    """A gpt-oss whose experts are stored in mxfp4; gives its folder and the dense experts by name."""
    config = transformers.GptOssConfig(
        **tiny._LLAMA_LIKE | {"hidden_size": 64, "intermediate_size": 64},
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    tiny.build(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors, dense = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape  # stored (experts, in, out) dense, (experts, out, in) packed
        nibbles = torch.randint(16, (experts, columns, rows // _GROUP, _GROUP), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, columns, rows // _GROUP), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        tensors[f"{name}_scales"] = scales
        values = torch.where(nibbles >= 8, -1.0, 1.0) * _VALUES[(nibbles & 7).int()]
        dense[name] = torch.ldexp(values, scales[..., None].int() - 127).flatten(2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    noted = json.loads((tmp_path / "config.json").read_text())
    noted["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(noted))
    return tmp_path, dense


def test_a_base_in_mxfp4_is_read_dense_and_trains(published):
    folder, dense = published
    model = load_model(str(folder))
    held = dict(model.named_parameters())
    assert len(dense) == 4
    for name, values in dense.items():
        assert torch.equal(held[name].float(), values)
    config = lowrank.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    lowrank.wrap(model, config)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_its_own_quantiser_does_not_train_is_refused():
    model = tiny.tiny_llama()
    model.hf_quantizer = SimpleNamespace(is_trainable=False, quantization_config=transformers.Mxfp4Config())
    config = lowrank.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(InputError, match="is quantised by mxfp4, whose kernels do not train"):
        lowrank.wrap(model, config)
    lowrank.wrap(model, config, trainable=False)
