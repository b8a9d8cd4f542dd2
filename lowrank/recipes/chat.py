"""Talking to a model, with an adapter or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from lowrank.attention import set_attention
from lowrank.errors import InputError
from lowrank.models import load_model, load_tokenizer
from lowrank.paths import expanded
from lowrank.recipes.show import open_console
from lowrank.training.answers import answer_all, greedy
from lowrank.training.progress import Screen
from lowrank.weights import load
from lowrank.weights.adapterfile import open_adapter

Messages = list[dict[str, str]]

_QUANTIZATION = ("load_in_", "bnb_4bit_")
_AT_A_TIME = 16  # prompts


def chat(path: str, *, prompts: Sequence[str] = (), system: str | None = None, max_new_tokens: int = 256) -> list[str]:
    """Answers to `prompts`, or a conversation until an empty line; answers are greedy.

    Args:
        path: A model's folder or name, or an adapter's folder (its base is found through it).
        prompts: Questions, each a conversation of its own; several are answered together.
        system: The system message.
        max_new_tokens: Longest answer.

    Returns:
        The answers to `prompts`.
    """
    path = expanded(path)
    model, tokenizer = open_model(path)
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; the model was not made to be talked to")
    begun: Messages = [] if system is None else [{"role": "system", "content": system}]
    asked: list[Messages] = [[*begun, {"role": "user", "content": prompt}] for prompt in prompts]
    if len(asked) > 1:
        return answers(model, tokenizer, asked, max_new_tokens)
    if asked:
        return [answer(model, tokenizer, asked[0], max_new_tokens)]
    console = open_console()
    console.print(f"{path}: an empty line ends the conversation", style="dim")
    while text := _asked(console):
        begun.append({"role": "user", "content": text})
        begun.append({"role": "assistant", "content": answer(model, tokenizer, begun, max_new_tokens)})
    return []


def open_model(path: str) -> tuple[Any, Any]:
    """The model of a folder or name, or an adapter on its base, quantised as it was while the adapter was trained."""
    if not (Path(path) / "adapter_config.json").exists():
        return load_model(path), load_tokenizer(path)
    adapter = open_adapter(path)
    if adapter.base is None:
        raise InputError("the adapter does not say which base it belongs to", where=path)
    trained_over = {key: value for key, value in (adapter.quantization or {}).items() if key.startswith(_QUANTIZATION)}
    model = load(load_model(adapter.base, quantization=trained_over or None), path)
    own_tokenizer = (Path(path) / "tokenizer_config.json").exists()
    return model, load_tokenizer(path if own_tokenizer else adapter.base)


def answer(model: Any, tokenizer: Any, messages: Messages, max_new_tokens: int) -> str:
    """The answer to a conversation, printed as it comes."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with greedy(model, tokenizer, max_new_tokens) as config:
        output = model.generate(**ids, generation_config=config, streamer=streamer)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def answers(model: Any, tokenizer: Any, asked: Sequence[Messages], max_new_tokens: int) -> list[str]:
    """The answers to several conversations at once, each printed beneath its question when all are there."""
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for messages in asked
    ]
    set_attention(model, "auto")
    with Screen(Console(stderr=True)) as screen, screen.task("answering", len(prompts)) as advance:
        found = answer_all(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=_AT_A_TIME, on_batch=advance
        )
    found = [text.strip() for text in found]
    console = open_console()
    for messages, text in zip(asked, found, strict=True):
        console.print(messages[-1]["content"], style="dim", markup=False)
        console.print(text, markup=False)
    return found


def _asked(console: Any) -> str:
    try:
        return console.input("[bold]you:[/] ").strip()
    except EOFError:
        return ""
