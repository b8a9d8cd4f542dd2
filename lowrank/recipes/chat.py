"""Talking to a model, with an adapter or without."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from transformers import StoppingCriteriaList, TextStreamer

from lowrank.attention import set_attention
from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.recipes.parts.asking import prompt_ids, room
from lowrank.recipes.parts.interrupt import Ended, ended_by_interrupt
from lowrank.recipes.parts.one_pass import ROWS
from lowrank.recipes.parts.opened import adapter_folder, open_model
from lowrank.recipes.parts.sampling import GREEDY, Sampling
from lowrank.recipes.parts.show import open_console
from lowrank.recipes.parts.talk import Messages, Talk
from lowrank.tasks.kinds_of_task import TASK_KINDS
from lowrank.training.callbacks.progress import Screen
from lowrank.training.diagnosis import refuse_broken_weights
from lowrank.training.evaluation.answers import answer_all, answer_text, greedy, up_to_end
from lowrank.weights.files.adapter_file import open_adapter
from lowrank.weights.files.notes import noted_system

_FINAL = re.compile(r"\s*(?:analysis.*?assistant)?final(.*)", re.DOTALL)
_QUOTES = '"""'


def chat(
    path: str,
    *,
    prompts: Sequence[str] = (),
    system: str | None = None,
    max_new_tokens: int = 256,
    base: str | None = None,
    use_adapter: bool = True,
    trust_remote_code: bool = False,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Answers to `prompts`, or a conversation until an empty line.

    Args:
        path: A model's or an adapter's folder or name on the hub (an adapter's base is found through it).
        prompts: Questions, each a conversation of its own; several are answered together.
        system: The system message; by default the one that nearly all training rows shared, if they did; "" for none.
        max_new_tokens: Longest answer.
        base: The adapter's base, where it is not the one that the adapter names.
        use_adapter: False: the adapter's base alone, asked as the adapter is.
        trust_remote_code: Whether code that comes with the model may run.
        sampling: How tokens are chosen; greedily by default.

    Returns:
        The answers to `prompts`.

    Raises:
        InputError: model or adapter cannot be used, or the chat template refuses the conversation.
    """
    refuse_a_task(path)
    model, tokenizer = open_model(path, base=base, use_adapter=use_adapter, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; the model was not made to be talked to")
    system = system_of(path, system)
    begun: Messages = [{"role": "system", "content": system}] if system else []
    asked: list[Messages] = [[*begun, {"role": "user", "content": prompt}] for prompt in prompts]
    refuse_broken(model, tokenizer, asked[0] if asked else [*begun, {"role": "user", "content": "Hi"}], path)
    if len(asked) > 1:
        return _answers(model, tokenizer, asked, max_new_tokens, sampling)
    if asked:
        return [answer(model, tokenizer, asked[0], max_new_tokens, sampling)]

    def reply(histories: Sequence[Messages]) -> list[str]:
        with ended_by_interrupt() as ended:
            said = answer(model, tokenizer, histories[0], max_new_tokens, sampling, ended)
        return [remembered(tokenizer, said)]

    converse(path, Talk([system]), reply)
    return []


def refuse_a_task(path: str) -> None:
    """Raises InputError for an adapter that predicts labels: it says no words."""
    folder = adapter_folder(path)
    kind = None if folder is None else open_adapter(folder).config.task_type
    if kind in {one.task_type for one in TASK_KINDS.values()}:
        raise InputError(
            f"{path} has learned labels ({kind}), and says no words", fix=f"Ask it with `lowrank predict {path}`."
        )


def system_of(path: str, system: str | None) -> str | None:
    """The system message to begin with: the one given, or the one that a run's rows shared, which is then told."""
    if system is None and (system := noted_system(adapter_folder(path) or Path(expanded(path)))) is not None:
        said = f'system prompt of the training rows (--system "" leaves it out): {" ".join(system.split())[:100]}'
        Console(stderr=True).print(said, style="dim", markup=False, emoji=False, highlight=False, soft_wrap=True)
    return system


def converse(name: str, talk: Talk, reply: Callable[[Sequence[Messages]], list[str]]) -> None:
    """Asks what is typed until an empty line, the input's end or Ctrl-C at the prompt.

    What cannot be asked is told, and the conversation is then as it was before.

    Args:
        name: Who answers, for the first line.
        talk: What was said so far.
        reply: Shows the answers to some histories and returns what is remembered of them.
    """
    console = open_console()
    console.print(f"{name}: an empty line ends the conversation, /help lists commands", style="dim", soft_wrap=True)
    if sys.stdin is not None and sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # gives `input` its history and its editing keys
    while text := _asked(console):
        try:
            if text.startswith("/") and not text.startswith("//"):
                console.print(talk.command(text), style="dim", soft_wrap=True, highlight=False)
                continue
            talk.ask(text[1:] if text.startswith("//") else text)
            try:
                talk.hear(reply(talk.histories))
            except BaseException:
                talk.take_back()
                raise
        except InputError as error:
            console.print(str(error), style="red", soft_wrap=True, highlight=False)
        except KeyboardInterrupt:
            console.print("\nnot answered", style="dim")


@torch.no_grad()
def refuse_broken(model: Any, tokenizer: Any, messages: Messages, name: str) -> None:
    """Raises InputError for a conversation that cannot be asked, and for a base whose weights hold NaN or infinity."""
    prompts = prompt_ids(tokenizer, [messages])
    room(model, tokenizer, prompts, 1)
    ids = torch.tensor(prompts, device=model.device)
    if not model(input_ids=ids).logits[:, -1].isfinite().all():
        refuse_broken_weights(model, name)


def answer(
    model: Any,
    tokenizer: Any,
    messages: Messages,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    ended: Ended | None = None,
    show: bool = True,
) -> str:
    """The answer to a conversation, printed as it comes; `ended` may end it early."""
    prompts = prompt_ids(tokenizer, [messages])
    ids = torch.tensor(prompts, device=model.device)
    max_new_tokens = room(model, tokenizer, prompts, max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    stopping = None if ended is None else StoppingCriteriaList([ended])
    with greedy(model, tokenizer, max_new_tokens) as config, sampling.drawing(config, model.device):
        mask = torch.ones_like(ids)
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer, stopping_criteria=stopping
        )
        return answer_text(tokenizer, up_to_end(output[0, ids.shape[1] :].tolist(), config.eos_token_id))


def _answers(
    model: Any, tokenizer: Any, asked: Sequence[Messages], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[str]:
    """The answers to several conversations at once, each printed beneath its question when all are there."""
    found = found_answers(model, tokenizer, asked, max_new_tokens, sampling)
    seen = Style(dim=open_console().is_terminal or None)
    for messages, text in zip(asked, found, strict=True):  # printed as they are: rich would wrap, and expand tabs
        print(seen.render(messages[-1]["content"]))
        print(text)
    return found


def found_answers(
    model: Any, tokenizer: Any, asked: Sequence[Messages], max_new_tokens: int, sampling: Sampling
) -> list[str]:
    """The answers to several conversations: greedy ones together, drawn ones each for itself."""
    prompts = prompt_ids(tokenizer, asked)
    max_new_tokens = room(model, tokenizer, prompts, max_new_tokens)
    if not sampling.draws:
        set_attention(model, "auto")
    with Screen(Console(stderr=True)) as screen, screen.task("answering", len(prompts)) as advance:
        if not sampling.draws:
            return answer_all(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=ROWS, on_batch=advance
            )
        found = []
        for messages in asked:
            found.append(answer(model, tokenizer, messages, max_new_tokens, sampling, show=False))
            advance(1)
        return found


def remembered(tokenizer: Any, text: str) -> str:
    """An answer as a conversation remembers it: of harmony's channels, whose marks are not in the text, the final."""
    channels = "<|channel|>" in str(tokenizer.chat_template)
    final = _FINAL.match(text) if channels else None
    return text if final is None else final[1]


def _asked(console: Any) -> str:
    """What is typed: one line, or those between two lines of three quotes. Empty at the input's end and at Ctrl-C."""
    typed = console.is_terminal and sys.stdin is not None and sys.stdin.isatty() and "readline" in sys.modules
    mark = "\x01\x1b[1m\x02you:\x01\x1b[0m\x02 " if typed else "you: "  # readline must know what has no width
    try:
        text = input(mark).strip()
        if not text.startswith(_QUOTES):
            return text
        lines = [text.removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(input())
        return "\n".join(lines).rstrip().removesuffix(_QUOTES).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
