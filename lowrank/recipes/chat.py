"""Talking to a model, with an adapter or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TextStreamer

from lowrank.errors import InputError
from lowrank.models import load_model, load_tokenizer
from lowrank.recipes.show import open_console
from lowrank.training.answers import greedy
from lowrank.weights import load
from lowrank.weights.adapterfile import open_adapter

Messages = list[dict[str, str]]

_QUANTIZATION = ("load_in_", "bnb_4bit_")


def chat(path: str, *, prompt: str | None = None, system: str | None = None, max_new_tokens: int = 256) -> None:
    """One answer to `prompt`, or a conversation until an empty line; answers are greedy.

    Args:
        path: A model's folder or name, or an adapter's folder (its base is found through it).
        prompt: The one question.
        system: The system message.
        max_new_tokens: Longest answer.
    """
    model, tokenizer = open_model(path)
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; the model was not made to be talked to")
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    if prompt is not None:
        answer(model, tokenizer, [*messages, {"role": "user", "content": prompt}], max_new_tokens)
        return
    console = open_console()
    console.print(f"{path}: an empty line ends the conversation", style="dim")
    while text := _asked(console):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, max_new_tokens)})


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


def _asked(console: Any) -> str:
    try:
        return console.input("[bold]you:[/] ").strip()
    except EOFError:
        return ""
