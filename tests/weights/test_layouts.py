"""Adapters in other layouts: mlx-lm's are read and written, others are told by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from weight_helpers import logits, reload, save_base, with_peft

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import compose, export, merge_checkpoint

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SCALE = 20.0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tiny_llama(), tmp_path / "base")


def mlx_folder(base: Path, folder: Path, method: str, **config: Any) -> Path:
    """What mlx-lm writes for the last of two layers."""
    model, tensors = reload(base), {}
    generator = torch.Generator().manual_seed(0)
    for path in (Q, UP):
        out, into = model.get_submodule(path).weight.shape
        tensors[f"{path}.lora_a"] = torch.randn(into, 3, generator=generator) * 0.1
        tensors[f"{path}.lora_b"] = torch.randn(3, out, generator=generator) * 0.02
        if method == "dora":
            tensors[f"{path}.m"] = torch.rand(out, generator=generator) + 0.5
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    fields = {
        "model": str(base),
        "fine_tune_type": method,
        "num_layers": 1,
        "lora_parameters": {"rank": 3, "dropout": 0.0, "scale": SCALE},
        "iters": 100,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def mlx_answers(base: Path, folder: Path, method: str) -> torch.Tensor:
    """mlx-lm's own formula, as a hook on each layer."""
    model, tensors = reload(base), load_file(folder / "adapters.safetensors")
    for path in (Q, UP):
        module = model.get_submodule(path)
        a, b, m = (tensors.get(f"{path}.{name}") for name in ("lora_a", "lora_b", "m"))

        def forward(x: torch.Tensor, module: Any = module, a: Any = a, b: Any = b, m: Any = m) -> torch.Tensor:
            y = F.linear(x, module.weight) + SCALE * ((x @ a) @ b)
            if m is None:
                return y
            return m / torch.linalg.norm(module.weight + (SCALE * b.T) @ a.T, dim=1) * y

        module.forward = forward
    return logits(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mlx_is_read_by_every_verb(base: Path, method: str, tmp_path: Path) -> None:
    folder = mlx_folder(base, tmp_path / "mlx", method)
    wanted = mlx_answers(base, folder, method)
    assert not torch.allclose(logits(reload(base)), wanted, atol=1e-2)
    torch.testing.assert_close(logits(lowrank.load(reload(base), folder)), wanted, atol=2e-5, rtol=0)
    merge_checkpoint(None, folder, tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=2e-5, rtol=0)
    export(folder, tmp_path / "peft", to="peft")
    torch.testing.assert_close(with_peft(base, tmp_path / "peft"), wanted, atol=2e-5, rtol=0)
    if method == "lora":
        compose([folder], out=tmp_path / "composed")
        torch.testing.assert_close(with_peft(base, tmp_path / "composed"), wanted, atol=2e-5, rtol=0)


def test_an_older_mlx_config_has_alpha_too(base: Path, tmp_path: Path) -> None:
    parameters = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "scale": SCALE / 2}
    folder = mlx_folder(base, tmp_path / "mlx", "lora", lora_parameters=parameters)
    wanted = mlx_answers(base, folder, "lora")
    torch.testing.assert_close(logits(lowrank.load(reload(base), folder)), wanted, atol=2e-5, rtol=0)


def test_a_full_fine_tune_of_mlx(base: Path, tmp_path: Path) -> None:
    model = reload(base)
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter += 0.01
    folder = mlx_folder(base, tmp_path / "mlx", "full")
    state = {name: p for name, p in model.state_dict().items() if name.startswith("model.layers.1.")}
    save_file(state, folder / "adapters.safetensors")
    torch.testing.assert_close(logits(lowrank.load(reload(base), folder)), logits(model), atol=1e-6, rtol=0)
    merge_checkpoint(base, folder, tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), logits(model), atol=1e-6, rtol=0)


def test_there_and_back(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=10, rank_pattern={"q_proj": 2}, layers_to_transform=[1], init_lora_weights=False
    )
    model = lowrank.wrap(reload(base), config)
    adapter, wanted = lowrank.save(model, tmp_path / "adapter"), logits(model)
    export(adapter, tmp_path / "mlx", to="mlx")
    written = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert "self_attn.q_proj" in written["lora_parameters"]["keys"]
    assert load_file(tmp_path / "mlx" / "adapters.safetensors")[f"{Q}.lora_a"].shape == (32, 4)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "mlx")), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("to", ["vllm", "peft", "mlx"])
@pytest.mark.parametrize("fields", [{"layers_to_transform": [1]}, {"exclude_modules": ["0.self_attn.q_proj"]}])
def test_an_export_of_some_layers_loads_back(base: Path, to: Any, fields: dict, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **fields)
    model = lowrank.wrap(reload(base), config)
    adapter, wanted = lowrank.save(model, tmp_path / "adapter"), logits(model)
    export(adapter, tmp_path / "out", to=to)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "out")), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fine_tune_type": "prefix"}, "fine_tune_type 'prefix' is not read"),
        ({"lora_parameters": {"rank": 3}}, "no lora_parameters with a scale"),
    ],
)
def test_mlx_configs_that_are_not_read(base: Path, change: dict, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        lowrank.load(reload(base), mlx_folder(base, tmp_path / "mlx", "lora", **change))


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("model.layers.0.mlp.switch_mlp.up_proj.lora_a", (4, 3, 32), "stacked experts"),
        ("model.layers.0.mlp.up_proj.lora_a", (32, 3), "not complete: model.layers.0.mlp.up_proj"),
        ("model.norm.weight", (32,), "tensors beside factors: model.norm.weight"),
    ],
)
def test_mlx_tensors_that_are_not_read(base: Path, name: str, shape: tuple, why: str, tmp_path: Path) -> None:
    folder = mlx_folder(base, tmp_path / "mlx", "lora")
    tensors = load_file(folder / "adapters.safetensors") | {name: torch.zeros(shape)}
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(InputError, match=why):
        lowrank.load(reload(base), folder)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya's"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "diffusers'"),
        ("model.layers.0.self_attn.q_proj.weight", "a whole model's"),
        ("base_model.q_proj.lora_A.default.weight", "a live peft model's"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune's"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "without the prefix"),
        ("lycoris_x.hada_w1_a", "LyCORIS's"),
    ],
)
def test_other_layouts_are_named(base: Path, name: str, layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=rf"(?s)no adapter_config.json.*{layout}"):
        lowrank.load(reload(base), folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match=layout):
        lowrank.load(reload(base), folder)
    with pytest.raises(InputError, match=layout):
        lowrank.load(reload(base), folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="; it holds a whole model"):
        lowrank.load(reload(base), base)
