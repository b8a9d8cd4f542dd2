"""What `lowrank info` knows of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_llama
from weight_helpers import randomise, tiny_qwen3_moe

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.recipes.info import show_info
from lowrank.weights.adapter_info import summarise

CONFIGS = [
    LoraConfig(r=4, rank_pattern={"k_proj": 2}, target_modules=["q_proj", "k_proj", "embed_tokens"]),
    LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "up_proj"]),
]


def made(config: object, folder: Path):
    model = lowrank.wrap(tiny_llama(), config)
    randomise(model)
    lowrank.save(model, folder)
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_figures(config: LoraConfig, tmp_path: Path) -> None:
    model = made(config, tmp_path / "a")
    summary = summarise(tmp_path / "a")
    assert summary.parameters == lowrank.describe(model)["default"].parameters
    assert sum(summary.modules.values()) == sum(summary.ranks.values())
    assert summary.modules["q_proj"] == 2
    for path, size in summary.norms.items():
        module = model.get_submodule(path)
        layer = module.adapters.layers()["default"]
        term = layer.term(module)
        exact = torch.linalg.matrix_norm(term.scale * term.B @ term.A).item()
        assert size == pytest.approx(exact, rel=1e-5)
    total = sum(size**2 for size in summary.norms.values())
    assert sum(size**2 for size in summary.layers.values()) == pytest.approx(total)
    assert set(summary.layers) <= {0, 1, None}


def test_the_screen_of_a_run(tmp_path: Path) -> None:
    made(CONFIGS[0], tmp_path)
    lines = [
        {"kind": "eval", "step": 0, "loss": 3.5},
        {"kind": "step", "step": 1, "loss": 3.25},
        {"kind": "step", "step": 2, "loss": 1.5},
        {"kind": "eval", "step": 2, "loss": 1.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_info(tmp_path, console)
    text = console.export_text()
    for piece in ("lora, lora_alpha 8", "2 (2 modules), 4 (3 modules)", "2 × k_proj", "vocab_size 320", "█", "others"):
        assert piece in text
    assert "trained 2 steps: loss 3.2500 → 1.5000" in text
    assert "evaluated at step 2: loss 1.25" in text


def test_experts_are_counted(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = lowrank.wrap(tiny_qwen3_moe(), config)
    lowrank.save(model, tmp_path / "a")
    summary = summarise(tmp_path / "a")
    assert summary.modules == {"q_proj": 2, "experts": 2}
    assert summary.ranks == {2: 4}
    assert set(summary.norms) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_neither_adapter_nor_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter folder"):
        show_info(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step"\n')
    with pytest.raises(InputError, match="not JSON"):
        show_info(tmp_path)
