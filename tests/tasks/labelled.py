"""Tiny bases of many architectures for tasks, and rows with labels that can be learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from tiny import VOCAB, tiny_llama, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: t.BertModel(t.BertConfig(**SIZES, **STILL)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**{**SIZES, "pad_token_id": 1}, **STILL)),
    "modernbert": lambda: t.ModernBertModel(
        t.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    ),
    "deberta": lambda: t.DebertaV2Model(
        t.DebertaV2Config(**SIZES, **STILL, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_dropout=0.0)
    ),
    "llama": tiny_llama,
}
WORDS = {"pos": "good nice lovely", "neg": "bad awful ugly", "plain": "usual grey flat"}


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Texts of one to four words of one kind, and what kind it is."""
    names = list(WORDS)
    found = []
    for i in range(first, first + count):
        words = WORDS[names[i % 3]].split()
        found.append({"text": " ".join(words[(i + j) % 3] for j in range(1 + i % 4)), "label": names[i % 3]})
    return found


def tagged(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Words, and which of them begin or go on with a name."""
    found = []
    for i in range(first, first + count):
        words = [*("see", "hear")[i % 2 : i % 2 + 1], "Anna", "Berg"[: 2 + i % 3], "in", "Rome"]
        found.append({"tokens": words, "tags": ["O", "B-PER", "I-PER", "O", "B-LOC"]})
    return found


def make_base(folder: Path, name: str) -> Path:
    """A base with its tokenizer in a folder."""
    torch.manual_seed(0)
    BASES[name]().save_pretrained(folder)
    tokenizer = tiny_tokenizer(None)
    if name == "roberta":
        tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, these: list[dict[str, Any]]) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in these), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The folder of each base, by name, made when it is first asked for."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = make_base(tmp_path_factory.mktemp(name), name)
        return made[name]

    return base


@pytest.fixture
def write_task(tmp_path, bases, monkeypatch):
    """Writes rows and a config for a short run; sections may be changed by keyword."""
    monkeypatch.chdir(tmp_path)

    def write(base: str = "llama", train: Any = None, held_out: Any = None, **sections: dict[str, Any]) -> Path:
        write_rows(tmp_path / "train.jsonl", rows(24) if train is None else train)
        write_rows(tmp_path / "eval.jsonl", rows(6, 30) if held_out is None else held_out)
        config: dict[str, Any] = {
            "model": {"name_or_path": str(bases(base))},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64},
            "training": {"output_dir": "out", "learning_rate": 1e-2, "num_train_epochs": 2, "report_to": "none"},
        }
        for section, values in sections.items():
            config[section] = values if "method" in values else {**config[section], **values}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / "run.yaml"

    return write
