"""The small files beside the weights: config, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lowrank.weights.adapterfile import read_json

_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
)
_OTHERS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_NEVER = ("*.index.json", "adapter_config.json", "config.json")


def copy_sidecars(base: Path, adapter: Path, out: Path) -> None:
    """Copies everything but weights and config from the base, and the tokenizer from the adapter if it has one.

    A tokenizer beside the adapter is the one that it was trained with: it knows the tokens that were added.
    """
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for file in _matching(base, _OTHERS):
        if not (own_tokenizer and any(file.match(pattern) for pattern in _TOKENIZER)):
            shutil.copyfile(file, out / file.name)
    if own_tokenizer:
        copy_tokenizer(adapter, out)
    for folder in (base, adapter) if own_tokenizer else (base,):
        if (folder / "additional_chat_templates").is_dir():
            shutil.copytree(folder / "additional_chat_templates", out / "additional_chat_templates", dirs_exist_ok=True)


def copy_model_notes(base: Path, out: Path) -> None:
    """Config and tokenizer of a model, without its weights."""
    shutil.copyfile(base / "config.json", out / "config.json")
    copy_tokenizer(base, out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """A model's tokenizer and chat template, where it has them."""
    for file in _matching(source, _TOKENIZER):
        shutil.copyfile(file, out / file.name)


def write_config(base: Path, out: Path, changes: dict[str, Any], text_key: str | None) -> None:
    """The base's config.json with some keys changed.

    Args:
        base: The folder it is read from.
        out: The folder it is written to.
        changes: Keys and their new values; None takes a key out.
        text_key: Where a composite model keeps its text model's config; a key that stands there changes there too.
    """
    if not changes:
        shutil.copyfile(base / "config.json", out / "config.json")
        return
    config = read_json(base / "config.json")
    text = config.get(text_key) if text_key else None
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
            continue
        old = "torch_dtype" if key == "dtype" and "torch_dtype" in config else key
        if isinstance(text, dict) and old in text:
            text[old] = value
        if not isinstance(text, dict) or old in config or old not in text or old == "tie_word_embeddings":
            config[old] = value
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in files if not any(file.match(pattern) for pattern in _NEVER))
