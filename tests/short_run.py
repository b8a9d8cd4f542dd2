"""A short run on a tiny model, as fixtures: its base on disk, and a config that a test can change."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny model with its tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def chats(count: int, offset: int = 0) -> list[dict]:
    """Short chats with an answer that can be learned: the request said back as JSON."""
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": json.dumps({"n": i})}]}
        for i in range(offset, offset + count)
    ]


@pytest.fixture
def write_config(tmp_path, base, monkeypatch):
    """Writes rows and a config for a short run; sections may be changed by keyword."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(24)))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(6, 100)))

    def write(name: str = "run.yaml", **sections: dict):
        config = {
            "model": {"name_or_path": str(base)},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
            "training": {"output_dir": "out", "learning_rate": 1e-2, "num_train_epochs": 2},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        (tmp_path / name).write_text(yaml.safe_dump(config))
        return tmp_path / name

    return write
