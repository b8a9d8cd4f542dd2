"""`lowrank check` says what `lowrank train` will hold at its peak, within 10 %: each in a process of its own."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tiny import build, tiny_llama, tiny_tokenizer

from lowrank.config import RunConfig
from lowrank.config.sections import DataSection, ModelSection, TrainingSection
from lowrank.recipes.check import check

SMOLLM = Path(__file__).parents[2] / ".cache" / "models" / "smollm2-135m-instruct"
SIZES = {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a whole process is Linux's")


def llama() -> transformers.PretrainedConfig:
    """54 M parameters."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 12}
    return transformers.LlamaConfig(vocab_size=16000, hidden_size=512, intermediate_size=1536, **heads, **SIZES)


def qwen2() -> transformers.PretrainedConfig:
    """23 M parameters."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6}
    return transformers.Qwen2Config(vocab_size=8192, hidden_size=512, intermediate_size=1024, **heads, **SIZES)


def gpt2() -> transformers.PretrainedConfig:
    """14 M parameters."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(vocab_size=8192, n_embd=384, n_layer=6, n_head=6, **dropout, **SIZES)


def rows(path: Path, count: int, words: int) -> None:
    """Chats of uneven lengths, of so many words in the mean."""
    generator = random.Random(0)

    def text() -> str:
        length = min(4 * words, 1 + int(generator.lognormvariate(0.0, 0.7) * words))
        return " ".join(generator.choice(["river", "old", "tree", "sings", "the"]) for _ in range(length))

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": text()}

    chats = [{"messages": [message("user"), message("assistant")]} for _ in range(count)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def run(verb: str, config: Path) -> tuple[float, str]:
    """The peak of `lowrank VERB` in MiB, and what it printed."""
    command = [sys.executable, "-m", "lowrank", verb, str(config)]
    process = subprocess.Popen(command, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    return usage.ru_maxrss / 1024, output


def compare(folder: Path, base: Path, tokens: int, **sections: dict) -> None:
    rows(folder / "train.jsonl", 200, 12)
    rows(folder / "eval.jsonl", 6, 8)
    config = {
        "model": {"name_or_path": str(base), "device": "cpu"},
        "adapter": ADAPTER,
        "data": {"train": "train.jsonl", "max_length": tokens, "too_long": "drop"},
        "training": {"output_dir": "out", "max_steps": 16, "report_to": "none"},
    }
    for section, values in sections.items():
        config[section] = values if section == "adapter" else {**config.get(section, {}), **values}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    _, told = run("check", folder / "run.yaml")
    found = re.search(r"about ([\d,]+) MiB at the peak", told)
    assert found, told
    peak, _ = run("train", folder / "run.yaml")
    print(f"{folder.name}: {found[1]} MiB told, {peak:,.0f} MiB held")
    assert float(found[1].replace(",", "")) == pytest.approx(peak, rel=0.1)


def test_its_parts_are_what_there_is(tmp_path, monkeypatch):
    """Factors of rank 16 with AdamW's two moments and a gradient, each in float32; the base as it is on disk."""
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "train.jsonl", 20, 4)
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    sections = {
        "model": ModelSection(name_or_path="base", device="cpu"),
        "adapter": {"method": "lora", **ADAPTER},
        "data": DataSection(train="train.jsonl", max_length=256),
        "training": TrainingSection(output_dir="out", report_to="none", gradient_accumulation_steps=2),
    }
    memory = check(RunConfig(**sections))
    factors = sum(16 * sum(m.weight.shape) * 4 for m in base.model.modules() if isinstance(m, torch.nn.Linear))
    assert memory.weights == sum(p.nbytes for p in base.parameters()) + factors
    assert memory.training == pytest.approx(3 * factors, rel=0.01)  # and a step count for each
    assert memory.total > memory.program + memory.weights + memory.training
    assert not (tmp_path / "out").exists()


def on_disk(folder: Path, config: Callable[[], transformers.PretrainedConfig], dtype: torch.dtype) -> Path:
    build(config(), dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.is_dir(), reason="make example fetches the model")
def test_lora_on_smollm2(tmp_path):
    compare(tmp_path, SMOLLM, 512)


@pytest.mark.slow
def test_lora_on_a_llama(tmp_path):
    base = on_disk(tmp_path / "base", llama, torch.bfloat16)
    compare(tmp_path, base, 1024, training={"gradient_accumulation_steps": 2})


@pytest.mark.slow
def test_dora_on_gpt2_with_answers(tmp_path):
    base = on_disk(tmp_path / "base", gpt2, torch.float32)
    answers = {"predict_with_generate": True, "generation_max_new_tokens": 64}
    compare(tmp_path, base, 1024, adapter={**ADAPTER, "method": "dora"}, data={"eval": "eval.jsonl"}, training=answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True}, {"quant_method": "torchao", "bits": 8}], ids=["nf4", "int8"]
)
def test_a_quantised_qwen2(options, tmp_path):
    base = on_disk(tmp_path / "base", qwen2, torch.bfloat16)
    compare(tmp_path, base, 1024, quantization=options)


@pytest.mark.slow
def test_every_weight_of_a_llama(tmp_path):
    base = on_disk(tmp_path / "base", llama, torch.bfloat16)
    compare(tmp_path, base, 512, adapter={"method": "full"})
