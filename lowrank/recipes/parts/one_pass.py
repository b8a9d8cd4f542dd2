"""Greedy answers of several voices in one pass: rows of one batch, which the base sees once, each with its adapter.

A batch rounds otherwise than a row alone, which can matter only where two tokens are about as likely. So the lead of
every token that is chosen is looked at; where one is within rounding, the row counts as not answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lowrank.adapters import routed
from lowrank.errors import InputError
from lowrank.recipes.parts.asking import prompt_ids, room
from lowrank.recipes.parts.interrupt import Ended
from lowrank.recipes.parts.sampling import Sampling
from lowrank.recipes.parts.talk import Messages
from lowrank.recipes.parts.voices import Voice
from lowrank.training.evaluation.answers import answer_text, greedy, up_to_end
from lowrank.training.evaluation.greedy import can_continue_rows, padded

ROWS = 16
"""That are asked at a time."""
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Of a logit, in relation to 1 and its size: well above what batches differ by."""


class MixedRowsError(Exception):
    """While they answered, the model turned out to mix its rows; the message says where."""


def why_apart(voices: Sequence[Voice], sampling: Sampling) -> str | None:
    """What keeps the voices from answering together as each alone; None where nothing does."""
    model = voices[0].model
    if sampling.draws:
        return "each draws its own tokens"
    if model.dtype not in _ROUNDING:
        return f"in {str(model.dtype).removeprefix('torch.')} a batch rounds too differently from one row"
    if not can_continue_rows(model):
        return f"rows of {type(model).__name__} cannot be padded to one length"
    try:
        with routed(model, [voice.adapter for voice in voices]):
            return None
    except InputError as error:
        return _named(error, voices)


def answers_together(
    voices: Sequence[Voice],
    asked: Sequence[Sequence[Messages]],
    max_new_tokens: int,
    ended: Ended | None = None,
    on_batch: Callable[[int], object] = lambda count: None,
) -> list[list[str | None]]:
    """What each voice answers to its conversations; None where it must be asked alone.

    Args:
        voices: Of one base, for which `why_apart` gave None.
        asked: For each voice as many conversations as for the others.
        max_new_tokens: Longest answer.
        ended: May end the answers early; what is there then counts.
        on_batch: Told how many answers have been added.

    Raises:
        InputError: a conversation cannot be asked.
        MixedRowsError: each must be asked alone.
    """
    prompts = [prompt_ids(voice.tokenizer, some) for voice, some in zip(voices, asked, strict=True)]
    rooms = [room(v.model, v.tokenizer, some, max_new_tokens) for v, some in zip(voices, prompts, strict=True)]
    found: list[list[str | None]] = [[None] * len(some) for some in asked]
    if len(set(rooms)) > 1:  # one is at the end of the model's positions before the others are
        return found
    places = [(v, i) for i in range(len(asked[0])) for v in range(len(voices))]
    for start in range(0, len(places), ROWS):
        some = places[start : start + ROWS]
        speakers, rows = [voices[v] for v, _ in some], [prompts[v][i] for v, i in some]
        try:
            texts = _generated(speakers, rows, rooms[0], ended)
        except InputError as error:
            raise MixedRowsError(_named(error, voices)) from error
        for (v, i), text in zip(some, texts, strict=True):
            found[v][i] = text
        on_batch(len(some))
    return found


def _generated(
    speakers: Sequence[Voice], rows: Sequence[Sequence[int]], max_new_tokens: int, ended: Ended | None
) -> list[str | None]:
    model = speakers[0].model
    ends = [_ends(voice) for voice in speakers]
    done = _Done(ends, model.device)
    lead = _Lead(done, _ROUNDING[model.dtype])
    with (
        greedy(model, speakers[0].tokenizer, max_new_tokens) as config,
        routed(model, [voice.adapter for voice in speakers]),
    ):
        config.eos_token_id = None  # each row has its own
        ids, mask = padded(rows, [0] * len(rows), config.pad_token_id or 0, model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([lead]),
            stopping_criteria=StoppingCriteriaList([done, *([] if ended is None else [ended])]),
        )
    sure = [True] * len(rows) if ended is not None and ended.asked else lead.sure.tolist()
    said = [up_to_end(row, end) for row, end in zip(output[:, ids.shape[1] :].tolist(), ends, strict=True)]
    texts = [answer_text(voice.tokenizer, row) for voice, row in zip(speakers, said, strict=True)]
    return [text if certain else None for text, certain in zip(texts, sure, strict=True)]


def _named(error: InputError, voices: Sequence[Voice]) -> str:
    """What it says, with the voices' names in place of their adapters'."""
    what = error.what
    for voice in voices:
        what = what.replace(repr(voice.adapter), voice.name)
    return what


def _ends(voice: Voice) -> list[int]:
    """The tokens that end its answers where it is alone."""
    with voice.speaking(), greedy(voice.model, voice.tokenizer, 1) as config:
        return list(config.eos_token_id)


class _Done(StoppingCriteria):
    """Which rows have reached one of their own end tokens."""

    def __init__(self, ends: Sequence[Sequence[int]], device: torch.device) -> None:
        most = max(map(len, ends))
        self.ends = torch.tensor([[*row, *[-1] * (most - len(row))] for row in ends], device=device)
        self.rows = torch.zeros(len(ends), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """(rows,)."""
        self.rows = self.rows | (input_ids[:, -1:] == self.ends).any(1)
        return self.rows


class _Lead(LogitsProcessor):
    """Notes in which rows a token was chosen that leads by no more than rounding; changes nothing."""

    def __init__(self, done: _Done, rounding: float) -> None:
        self.done, self.rounding = done, rounding
        self.sure = torch.ones_like(done.rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores (rows, V), as they are."""
        first, second = scores.topk(2, dim=-1).values.unbind(-1)
        self.sure = self.sure & (self.done.rows | (first - second > self.rounding * (1 + first.abs())))
        return scores
