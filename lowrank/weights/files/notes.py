"""What lies beside an adapter, so that it is asked and answers as it was trained: its tokenizer, and what ends answers.

The tokenizer holds the chat template. `generation_config.json` is the base's, with the tokens that end trained turns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank.weights.files.adapter_file import read_json

GENERATION = "generation_config.json"
SYSTEM = "system_prompt.txt"
"""The system prompt that the training rows shared."""
TEMPLATES = "additional_chat_templates"
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
)
"""The files of a tokenizer."""


def stop_at(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """Makes a model's answers end at these tokens too, and gives its tokenizer the first if it has no end token.

    Returns:
        All tokens that end its answers: these, then those that its config and its tokenizer name.
    """
    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _end_at(model, ends, own)


def stop_as_noted(model: Any, folder: Path) -> None:
    """Makes a model that generates end its answers also where what lies beside its adapter says."""
    ends = noted_ends(folder)
    if ends and getattr(model, "generation_config", None) is not None:
        _end_at(model, ends)


def _end_at(model: Any, first: Sequence[int], last: Sequence[int] = ()) -> list[int]:
    every = list(dict.fromkeys([*first, *_listed(model.generation_config.eos_token_id), *last]))
    model.generation_config.eos_token_id = every or None
    return every


def write_notes(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a tokenizer and a model's generation config into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:  # a classifier has none
        _write_json(folder / GENERATION, model.generation_config.to_diff_dict())


def copy_notes(source: Path, out: Path) -> None:
    """Copies what lies beside an adapter to another one, as far as it is there; beside a single file lies nothing."""
    copy_tokenizer(source, out)
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, out / GENERATION)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies a tokenizer and its chat templates, as far as they are there."""
    for file in {file for pattern in TOKENIZER for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, out / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, out / TEMPLATES, dirs_exist_ok=True)


def note_files(folder: Path) -> list[Path]:
    """All of these that lie in a folder, in the order of their names."""
    names = {*TOKENIZER, GENERATION, SYSTEM, f"{TEMPLATES}/*"}
    return sorted(file for name in names for file in folder.glob(name) if file.is_file())


def noted_ends(folder: Path) -> list[int]:
    """The tokens at which the answers of what lies in a folder end; none where it does not say."""
    file = folder / GENERATION
    return _listed(read_json(file).get("eos_token_id")) if file.is_file() else []


def note_ends(folder: Path, ends: Sequence[int]) -> None:
    """Names tokens at which answers end before those that the folder's generation config has."""
    file = folder / GENERATION
    if not ends:
        return
    config = read_json(file)
    config["eos_token_id"] = list(dict.fromkeys([*ends, *_listed(config.get("eos_token_id"))]))
    _write_json(file, config)


def note_system(folder: Path, text: str | None) -> None:
    """Keeps the system prompt that an adapter was trained behind; None where its rows shared none."""
    if text is not None:
        (folder / SYSTEM).write_text(text, encoding="utf-8")


def noted_system(folder: Path) -> str | None:
    """What `note_system` kept in a folder; None where there is none."""
    file = folder / SYSTEM
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _listed(tokens: Any) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
