"""What the fine-tunes of `benchmarks/finetune.py` train, and on what."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank.data import load_examples
from lowrank.models import load_tokenizer

MODELS = Path(".cache/models")
SMALL = MODELS / "smollm2-135m-instruct"
IGNORED = -100
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Case:
    """A model and the shape of its rows.

    Attributes:
        what: In words.
        rows: In a step.
        mean_length: Of a row, in tokens.
        spread: Of the logarithm of the lengths; 0 for rows of one length.
        longest: Of a row, in tokens.
        system: So many tokens at the beginning of every row are the same.
        rows_from: A file of chats, instead of random rows.
        pack_tokens: In a pack; by default as many as a padded batch holds.
        steps: In a run; the first is warm-up.
        repeats: Of a run.
        shape: Of a random Llama in bfloat16; None for SmolLM2-135M.
    """

    what: str
    rows: int = 16
    mean_length: int = 200
    spread: float = 0.6
    longest: int = 1000
    system: int = 0
    rows_from: Path | None = None
    pack_tokens: int | None = None
    steps: int = 4
    repeats: int = 5
    shape: dict[str, Any] | None = None


_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
CASES = {
    "chat": Case("SmolLM2-135M, 16 chat-shaped rows a step"),
    "long": Case(
        "SmolLM2-135M, one row of 4,096 tokens a step", rows=1, mean_length=4096, spread=0.0, longest=4096, steps=3
    ),
    "tools": Case(
        "SmolLM2-135M, 16 tool-call rows a step, which begin with the same tools or others",
        mean_length=300,
        longest=512,
        rows_from=Path("examples/data/toolcalls_train.jsonl"),
        pack_tokens=4800,
    ),
    "shared": Case(
        "SmolLM2-135M, 16 rows a step: one system prompt of 1,500 tokens and turns of 100",
        mean_length=1600,
        spread=0.0,
        longest=1600,
        system=1500,
        steps=3,
    ),
    "1b": Case(
        "a random Llama of 1.2 billion weights (shapes of Llama-3.2-1B), 4 chat-shaped rows a step",
        rows=4,
        steps=2,
        repeats=1,
        shape=_LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    ),
    "8b": Case(
        "a random Llama of 8 billion weights (shapes of Llama-3.1-8B), 16 chat-shaped rows a step",
        shape=_LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    ),
}


def model_of(name: str) -> Path:
    """The folder of a case's base; a random one is made when it is not there."""
    shape = CASES[name].shape
    return SMALL if shape is None else _random_llama(MODELS / f"llama-{name}-random", shape)


def rows_file_of(name: str) -> str | None:
    """A case's rows as `job.rows_of` takes them, tokenised once; None where they are random."""
    source = CASES[name].rows_from
    if source is None:
        return None
    examples = load_examples(str(source), load_tokenizer(str(SMALL)), max_length=CASES[name].longest)
    rows = [[e.input_ids, np.where(e.supervised, e.input_ids, IGNORED).tolist()] for e in examples]
    file = MODELS.parent / "benchmarks" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def _random_llama(folder: Path, shape: dict[str, Any]) -> Path:
    """One safetensors file, with SmolLM2's tokenizer beside it."""
    if folder.exists():
        return folder
    config = LlamaConfig(
        **shape,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if shutil.disk_usage(MODELS).free < 2 * (2 * weights):  # LitGPT's copy of the weights comes beside it
        raise SystemExit(f"{folder} and its copy for LitGPT need {4 * weights / 1e9:.0f} GB of disk")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made, max_shard_size="100GB")
    for file in TOKENIZER:
        if (SMALL / file).exists():
            shutil.copy(SMALL / file, made / file)
    return made.rename(folder)
