"""Talking to a model, with an adapter or without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text
from transformers import TextStreamer

from lowrank.attention import set_attention
from lowrank.data.rowerror import RowError
from lowrank.data.template import ChatTemplate
from lowrank.errors import InputError
from lowrank.models import positions_of, vocabulary_of
from lowrank.paths import expanded
from lowrank.recipes.parts.opened import adapter_folder, open_model
from lowrank.recipes.show import open_console
from lowrank.training.answers import answer_all, answer_text, greedy, up_to_end
from lowrank.training.diagnosis import refuse_broken_weights
from lowrank.training.progress import Screen
from lowrank.weights.notes import noted_system

Messages = list[dict[str, str]]

_FINAL = re.compile(r"\s*(?:analysis.*?assistant)?final(.*)", re.DOTALL)
_AT_A_TIME = 16  # prompts


def chat(
    path: str,
    *,
    prompts: Sequence[str] = (),
    system: str | None = None,
    max_new_tokens: int = 256,
    base: str | None = None,
    use_adapter: bool = True,
    trust_remote_code: bool = False,
) -> list[str]:
    """Answers to `prompts`, or a conversation until an empty line; answers are greedy.

    Args:
        path: A model's or an adapter's folder or name on the hub (an adapter's base is found through it).
        prompts: Questions, each a conversation of its own; several are answered together.
        system: The system message; by default the one that nearly all training rows shared, if they did; "" for none.
        max_new_tokens: Longest answer.
        base: The adapter's base, where it is not the one that the adapter names.
        use_adapter: False: the adapter's base alone, asked as the adapter is.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The answers to `prompts`.

    Raises:
        InputError: model or adapter cannot be used, or the chat template refuses the conversation.
    """
    model, tokenizer = open_model(path, base=base, use_adapter=use_adapter, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; the model was not made to be talked to")
    if system is None and (system := noted_system(adapter_folder(path) or Path(expanded(path)))) is not None:
        said = f'system prompt of the training rows (--system "" leaves it out): {" ".join(system.split())[:100]}'
        Console(stderr=True).print(said, style="dim", markup=False, emoji=False, highlight=False, soft_wrap=True)
    begun: Messages = [{"role": "system", "content": system}] if system else []
    asked: list[Messages] = [[*begun, {"role": "user", "content": prompt}] for prompt in prompts]
    refuse_broken(model, tokenizer, asked[0] if asked else [*begun, {"role": "user", "content": "Hi"}], path)
    if len(asked) > 1:
        return answers(model, tokenizer, asked, max_new_tokens)
    if asked:
        return [answer(model, tokenizer, asked[0], max_new_tokens)]
    console = open_console()
    console.print(f"{path}: an empty line ends the conversation", style="dim", markup=False, emoji=False)
    while text := _asked(console):
        begun.append({"role": "user", "content": text})
        begun.append(
            {"role": "assistant", "content": _said(tokenizer, answer(model, tokenizer, begun, max_new_tokens))}
        )
    return []


@torch.no_grad()
def refuse_broken(model: Any, tokenizer: Any, messages: Messages, name: str) -> None:
    """Raises InputError for a conversation that cannot be asked, and for a base whose weights hold NaN or infinity."""
    prompts = prompt_ids(tokenizer, [messages])
    room(model, tokenizer, prompts, 1)
    ids = torch.tensor(prompts, device=model.device)
    if not model(input_ids=ids).logits[:, -1].isfinite().all():
        refuse_broken_weights(model, name)


def prompt_ids(tokenizer: Any, asked: Sequence[Messages]) -> list[list[int]]:
    """What the model is given for each conversation, as in training: up to where its answer begins.

    Raises:
        InputError: the chat template refuses a conversation.
    """
    try:
        texts = ChatTemplate(tokenizer).prompts(asked, None)
    except RowError as error:
        raise InputError(error.what, fix="Without --system, if it is the system message that it refuses.") from None
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def answer(model: Any, tokenizer: Any, messages: Messages, max_new_tokens: int) -> str:
    """The answer to a conversation, printed as it comes."""
    prompts = prompt_ids(tokenizer, [messages])
    ids = torch.tensor(prompts, device=model.device)
    max_new_tokens = room(model, tokenizer, prompts, max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with greedy(model, tokenizer, max_new_tokens) as config:
        mask = torch.ones_like(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
        return answer_text(tokenizer, up_to_end(output[0, ids.shape[1] :].tolist(), config.eos_token_id))


def answers(model: Any, tokenizer: Any, asked: Sequence[Messages], max_new_tokens: int) -> list[str]:
    """The answers to several conversations at once, each printed beneath its question when all are there."""
    prompts = prompt_ids(tokenizer, asked)
    max_new_tokens = room(model, tokenizer, prompts, max_new_tokens)
    set_attention(model, "auto")
    with Screen(Console(stderr=True)) as screen, screen.task("answering", len(prompts)) as advance:
        found = answer_all(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=_AT_A_TIME, on_batch=advance
        )
    seen = Style(dim=open_console().is_terminal or None)
    for messages, text in zip(asked, found, strict=True):  # printed as they are: rich would wrap, and expand tabs
        print(seen.render(messages[-1]["content"]))
        print(text)
    return found


def room(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], asked: int) -> int:
    """How many tokens of the `asked` ones an answer may have, where the model has only so many positions.

    Raises:
        InputError: a prompt leaves no room for an answer, or holds a token that the embedding lacks.
    """
    vocabulary, positions = vocabulary_of(model), positions_of(model)
    largest, longest = max(token for prompt in prompts for token in prompt), max(map(len, prompts))
    if largest >= vocabulary:
        raise InputError(
            f"the prompt holds the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's "
            f"embedding has only {vocabulary} rows",
            fix="Take the tokenizer that belongs to the model.",
        )
    if positions is not None and longest >= positions:
        raise InputError(
            f"the prompt has {longest} tokens, and the model has only {positions} positions", fix="Ask for less."
        )
    return asked if positions is None else min(asked, positions - longest)


def _said(tokenizer: Any, text: str) -> str:
    """An answer as a conversation remembers it: of harmony's channels, whose marks are not in the text, the final."""
    channels = "<|channel|>" in str(tokenizer.chat_template)
    final = _FINAL.match(text) if channels else None
    return text if final is None else final[1]


def _asked(console: Any) -> str:
    try:
        return console.input(Text("you: ", style="bold")).strip()
    except EOFError:
        return ""
