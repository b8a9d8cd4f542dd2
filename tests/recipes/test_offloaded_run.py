"""Offloaded layers train as those that stay, bit for bit; two of them are there at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import EIGHT, causal
from processes import start
from tiny import tiny_gemma2, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer

import lowrank
from lowrank.errors import InputError
from lowrank.recipes.check import check

ADAPTER = "adapter_model.safetensors"
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=4),
    "tied": lambda: tiny_llama(num_hidden_layers=3, tie_word_embeddings=True),
    "bfloat16": lambda: tiny_llama(num_hidden_layers=4).bfloat16(),
    "qwen2": lambda: tiny_qwen2(num_hidden_layers=4),
    "gemma2": lambda: tiny_gemma2(num_hidden_layers=4),
    "gpt2": lambda: tiny_gpt2(n_layer=4),
    "moe": causal(
        transformers.Qwen3MoeConfig(
            **{**EIGHT, "num_hidden_layers": 4}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        )
    ),
}
WAYS = [*((name, {}) for name in MODELS), *((name, {"use_dora": True}) for name in ("llama", "gpt2", "moe"))]
"""DoRA asks for a weight's norms besides: of a linear layer, of one stored the other way round, beside experts."""


def saved(folder: Path, name: str) -> Path:
    MODELS[name]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def outcome(folder: Path) -> tuple[list[float], bytes]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line.get("loss", line.get("eval_loss")) for line in lines]
    assert len(losses) > 3
    return losses, (folder / ADAPTER).read_bytes()


@pytest.fixture
def config(write_config, tmp_path):
    def write(name: str, **sections: dict) -> Path:
        adapter = {"target_modules": "all-linear", **sections.pop("adapter", {})}
        return write_config(model={"name_or_path": str(saved(tmp_path / name, name))}, adapter=adapter, **sections)

    return write


@pytest.mark.parametrize(("name", "adapter"), WAYS)
def test_no_bit_changes(config, tmp_path, name, adapter):
    path = config(name, adapter=adapter)
    lowrank.train(path)
    lowrank.train(path, ["training.offload=layers", "training.output_dir=offloaded"])
    assert outcome(tmp_path / "offloaded") == outcome(tmp_path / "out")


def test_experts_that_adapters_are_on(config, tmp_path):
    path = config("moe", adapter={"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]})
    lowrank.train(path)
    lowrank.train(path, ["training.offload=layers", "training.output_dir=offloaded"])
    assert outcome(tmp_path / "offloaded") == outcome(tmp_path / "out")


@pytest.mark.parametrize("ways", [("none", "layers"), ("layers", "none"), ("layers", "layers")])
def test_resumed_with_it_or_without(config, tmp_path, ways):
    path = config("llama", training={"save_steps": 1, "tokens_per_batch": 256})
    lowrank.train(path)
    command = ["train", str(path), "--set", "training.output_dir=resumed", "--set"]
    killed = start(tmp_path, [*command, f"training.offload={ways[0]}"], dies=("step", 2))
    killed.join(100)
    assert killed.exitcode < 0
    lowrank.train(path, ["training.output_dir=resumed", f"training.offload={ways[1]}"], resume=True)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "out")


def test_what_was_trained_loads_merges_and_answers(config, tmp_path):
    path = config(
        "llama", training={"offload": "layers", "predict_with_generate": True, "generation_max_new_tokens": 4}
    )
    result = lowrank.train(path)
    assert result.after is not None
    assert result.after.samples
    lowrank.merge_checkpoint(str(tmp_path / "llama"), str(tmp_path / "out"), str(tmp_path / "merged"))
    ids = torch.arange(3, 15)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(lowrank.load(tmp_path / "out")(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_plan_and_check_tell_of_it(config, tmp_path, capsys):
    path = config("llama", training={"offload": "layers"})
    estimates = [check(path, [f"training.offload={way}"]) for way in ("none", "layers")]
    told = " ".join(capsys.readouterr().out.split())
    assert "4 layers of up to 0.0 MiB, two at a time; the others in the model's files; each runs twice" in told
    model = MODELS["llama"]()
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters() if p.dim() == 2)
    assert estimates[0].weights - estimates[1].weights == 2 * layer


def test_weights_that_were_converted_are_refused(config):
    path = config("llama", training={"offload": "layers"})
    with pytest.raises(InputError, match="no weight of the model's layers lies in a file"):
        lowrank.train(path, ["model.dtype=bfloat16"])
