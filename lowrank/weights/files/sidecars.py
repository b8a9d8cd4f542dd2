"""The small files beside the weights: config, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lowrank.weights.files.adapter_file import read_json
from lowrank.weights.files.notes import GENERATION, TEMPLATES, TOKENIZER, copy_tokenizer, note_ends, noted_ends

_OTHERS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
# A tokenizer of an older make beside tokenizer.json; it knows the same tokens if none have been added.
_OLDER = ("tokenizer.model", "vocab.*", "merges.txt", "*.tiktoken")
_NEVER = ("*.index.json", "adapter_config.json", "config.json")


def copy_sidecars(base: Path, adapter: Path, out: Path) -> None:
    """Copies everything but weights and config from the base, and the tokenizer from the adapter if it has one.

    A tokenizer beside the adapter is the one that it was trained with: it knows the tokens that were added, and the
    chat template. Where the adapter says which tokens end its answers, the generation config names them too.
    """
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    replaced = TOKENIZER if own_tokenizer else ()
    if own_tokenizer and _added_tokens(base) == _added_tokens(adapter):
        replaced = tuple(pattern for pattern in TOKENIZER if pattern not in _OLDER)
    for file in _matching(base, _OTHERS):
        if not any(file.match(pattern) for pattern in replaced):
            shutil.copyfile(file, out / file.name)
    if own_tokenizer:
        copy_tokenizer(adapter, out)
    elif (base / TEMPLATES).is_dir():
        shutil.copytree(base / TEMPLATES, out / TEMPLATES)
    if (out / GENERATION).is_file():
        note_ends(out, noted_ends(adapter))
    elif (adapter / GENERATION).is_file():
        shutil.copyfile(adapter / GENERATION, out / GENERATION)


def _added_tokens(folder: Path) -> int | None:
    """How many tokens a tokenizer has beside its vocabulary; None where it does not say."""
    file = folder / "tokenizer.json"
    return len(read_json(file).get("added_tokens", [])) if file.is_file() else None


def copy_model_notes(base: Path, out: Path) -> None:
    """Config and tokenizer of a model, without its weights."""
    shutil.copyfile(base / "config.json", out / "config.json")
    copy_tokenizer(base, out)


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
            for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
                part.pop(key, None)
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
