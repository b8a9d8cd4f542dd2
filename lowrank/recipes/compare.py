"""The same questions to a base and its adapter, or to several adapters, with the answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lowrank.errors import InputError
from lowrank.recipes.chat import answer, converse, found_answers, refuse_a_task, refuse_broken, remembered, system_of
from lowrank.recipes.parts.interrupt import Ended, ended_by_interrupt
from lowrank.recipes.parts.one_pass import MixedRowsError, answers_together, why_apart
from lowrank.recipes.parts.sampling import GREEDY, Sampling
from lowrank.recipes.parts.show import open_console
from lowrank.recipes.parts.talk import Messages, Talk
from lowrank.recipes.parts.voices import Voice, open_voices
from lowrank.training.callbacks.progress import Screen


def compare(
    paths: Sequence[str],
    *,
    prompts: Sequence[str] = (),
    system: str | None = None,
    max_new_tokens: int = 256,
    base: str | None = None,
    trust_remote_code: bool = False,
    sampling: Sampling = GREEDY,
) -> dict[str, list[str]]:
    """What a base and its adapter, or several adapters of one base, answer to `prompts`, or in a conversation.

    Each answers as `chat` with it alone does: with its own template, end tokens and system message. In a conversation
    each remembers its own answers. Greedy answers come in one pass over the base, through `routed`, where that gives
    the same ones; why it does not is told, and each is asked alone then.

    Args:
        paths: An adapter's folder or name; or several adapters' of one base, which is loaded once.
        prompts: Questions, each a conversation of its own; without any there is a conversation until an empty line.
        system: The system message of all; by default each adapter's own (the base has its adapter's); "" for none.
        max_new_tokens: Longest answer.
        base: The adapters' base, where it is not the one that they name.
        trust_remote_code: Whether code that comes with the model may run.
        sampling: How tokens are chosen; greedily by default.

    Returns:
        For each one's name the answers to `prompts`. Names are the folders', and "base".

    Raises:
        InputError: an adapter cannot be used, their bases differ, or a chat template refuses the conversation.
    """
    for path in paths:
        refuse_a_task(path)
    voices, talk = _introduced(
        paths, open_voices(paths, base, trust_remote_code), system, prompts[0] if prompts else "Hi"
    )
    names = [voice.name for voice in voices]
    if (why := why_apart(voices, sampling)) is not None:
        _tell(why)
    if prompts:
        asked = [[[*begun, {"role": "user", "content": text}] for text in prompts] for begun in talk.histories]
        found = _answers(voices, asked, _Way(max_new_tokens, sampling, why is None, nullcontext))
        console = open_console()
        for i, text in enumerate(prompts):
            print(Style(dim=console.is_terminal or None).render(text))
            show(console, names, [answers[i] for answers in found])
        return dict(zip(names, found, strict=True))

    way = _Way(max_new_tokens, sampling, why is None, ended_by_interrupt)

    def reply(histories: Sequence[Messages]) -> list[str]:
        asked = [[history] for history in histories]
        said = [one for (one,) in _answers(voices, asked, way)]
        show(open_console(), names, said)
        return [remembered(voice.tokenizer, text) for voice, text in zip(voices, said, strict=True)]

    converse(" | ".join(names), talk, reply)
    return {name: [] for name in names}


def _introduced(paths: Sequence[str], voices: list[Voice], system: str | None, first: str) -> tuple[list[Voice], Talk]:
    """The voices, found to be able to answer a first question, and their conversation before it."""
    for voice in voices:
        if voice.tokenizer.chat_template is None:
            raise InputError(f"{voice.path}: its tokenizer has no chat template; it was not made to be talked to")
    own = {path: system_of(path, system) for path in paths}
    talk = Talk([own[voice.path] for voice in voices], [voice.name for voice in voices])
    for voice, begun in zip(voices, talk.histories, strict=True):
        with voice.speaking():
            asked = [*begun, {"role": "user", "content": first}]
            refuse_broken(voice.model, voice.tokenizer, asked, voice.path)
    return voices, talk


@dataclass(frozen=True)
class _Way:
    """How answers are found.

    Attributes:
        max_new_tokens: Longest answer.
        sampling: How tokens are chosen.
        joined: Whether all are asked in one pass.
        ending: What may end answers early.
    """

    max_new_tokens: int
    sampling: Sampling
    joined: bool
    ending: Callable[[], AbstractContextManager[Ended | None]]


def _answers(voices: Sequence[Voice], asked: Sequence[Sequence[Messages]], way: _Way) -> list[list[str]]:
    """What each says to its conversations: together where that is asked for, and alone what is then not answered."""
    found: list[list[str | None]] = [[None] * len(some) for some in asked]
    if way.joined:
        count = sum(map(len, asked))
        try:
            with (
                way.ending() as ended,
                Screen(Console(stderr=True)) as screen,
                screen.task("answering", count) as advance,
            ):
                found = answers_together(voices, asked, way.max_new_tokens, ended, advance)
        except MixedRowsError as reason:
            _tell(str(reason))
    return [_filled(*row, way) for row in zip(voices, asked, found, strict=True)]


def _filled(voice: Voice, asked: Sequence[Messages], found: Sequence[str | None], way: _Way) -> list[str]:
    """The answers, with those that are missing as the voice gives them alone."""
    left = iter(_alone(voice, [some for some, text in zip(asked, found, strict=True) if text is None], way))
    return [next(left) if text is None else text for text in found]


def _alone(voice: Voice, asked: Sequence[Messages], way: _Way) -> list[str]:
    if not asked:
        return []
    with voice.speaking():
        if len(asked) > 1:
            return found_answers(voice.model, voice.tokenizer, asked, way.max_new_tokens, way.sampling)
        given = (voice.model, voice.tokenizer, asked[0], way.max_new_tokens, way.sampling)
        with way.ending() as ended:
            return [answer(*given, ended, show=False)]


def _tell(why: str) -> None:
    Console(stderr=True).print(f"each is asked alone: {why}", style="dim", markup=False, soft_wrap=True)


def show(console: Console, names: Sequence[str], said: Sequence[str]) -> None:
    """Answers in columns on a terminal; elsewhere each as it is, beneath its name."""
    if not console.is_terminal:
        for name, text in zip(names, said, strict=True):
            print(f"[{name}]\n{text}")
        return
    table = Table(box=box.SIMPLE, expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, said))
    console.print(table)
