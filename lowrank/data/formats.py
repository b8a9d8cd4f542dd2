"""The formats rows come in, one reader each: from the keys of a row to what the row says.

A new format is one function here and one line in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.data.conversation import Conversation, Message, Plain, Preference, conversation
from lowrank.data.rowerror import RowError

Row = Mapping[str, Any]
Content = Conversation | Plain | Preference

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True, slots=True)
class Format:
    """One format of rows.

    Attributes:
        expects: What a row looks like, for error messages.
        needs: The keys that a row must have to be of this format.
        read: From a row to what it says; the flag tells whether there is a chat template.
    """

    expects: str
    needs: tuple[str, ...]
    read: Callable[[Row, bool], Content]


def _messages(row: Row, has_template: bool) -> Content:
    return conversation(row["messages"], row.get("tools"))


def _sharegpt(row: Row, has_template: bool) -> Content:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError("the conversations are not a list of objects", f"Expected {FORMATS['sharegpt'].expects}.")
    if turns and "role" in turns[0]:
        return conversation(turns, row.get("tools"))
    messages = [_sharegpt_turn(turn, at) for at, turn in enumerate(turns)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return conversation(messages, row.get("tools"))


def _sharegpt_turn(turn: Mapping[str, Any], at: int) -> Message:
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowError(f'turn {at + 1} is "from" {speaker!r}', f"Known are {', '.join(SHAREGPT_ROLES)}.")
    train = {"train": turn["train"]} if "train" in turn else {}
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": value, **train}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RowError(f"the function call in turn {at + 1} is not valid JSON: {error}") from None
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **train}


def _alpaca(row: Row, has_template: bool) -> Content:
    instruction, extra, output = (_text(row, key) for key in ("instruction", "input", "output"))
    if not has_template:
        form = ALPACA_WITH_INPUT if extra.strip() else ALPACA_WITHOUT_INPUT
        return Plain(form.format(instruction=instruction, input=extra), output)
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for asked, answered in _history(row):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return conversation(messages, row.get("tools"), completion_from=len(messages) - 1)


def _history(row: Row) -> list[Any]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("the history is not a list of pairs", "Expected [[question, answer], ...].")
    return history


def _prompt_completion(row: Row, has_template: bool) -> Content:
    return _continued(row, "completion")


def _continued(row: Row, key: str) -> Conversation | Plain:
    """A prompt and what follows it, both texts or both lists of messages."""
    prompt, completion = row["prompt"], row[key]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Plain(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], row.get("tools"), completion_from=len(prompt))
    raise RowError(f"prompt and {key} are neither both text nor both lists of messages")


def _plain_text(row: Row, has_template: bool) -> Content:
    return Plain("", _text(row, "text"))


def _preference(row: Row, has_template: bool) -> Content:
    if "prompt" not in row:
        return Preference(conversation(row["chosen"]), conversation(row["rejected"]))
    return Preference(_continued(row, "chosen"), _continued(row, "rejected"))


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} is not text but {value!r:.60}")
    return value


FORMATS: dict[str, Format] = {
    "messages": Format('{"messages": [{"role": ..., "content": ...}, ...]}', ("messages",), _messages),
    "sharegpt": Format('{"conversations": [{"from": "human", "value": ...}, ...]}', ("conversations",), _sharegpt),
    "preference": Format('{"prompt": ..., "chosen": ..., "rejected": ...}', ("chosen", "rejected"), _preference),
    "prompt_completion": Format('{"prompt": ..., "completion": ...}', ("prompt", "completion"), _prompt_completion),
    "alpaca": Format('{"instruction": ..., "input": ..., "output": ...}', ("instruction", "output"), _alpaca),
    "text": Format('{"text": ...}', ("text",), _plain_text),
}


def detect(row: Row) -> str:
    """The format of a row, by its keys.

    Raises:
        RowError: it fits none; the message lists its keys and what was expected.
    """
    for name, form in FORMATS.items():
        if all(row.get(key) is not None for key in form.needs):
            return name
    keys = ", ".join(map(repr, row)) or "no keys at all"
    expected = "\n".join(f"  {name}: {form.expects}" for name, form in FORMATS.items())
    raise RowError(f"the row has {keys}, which fits none of the known formats", f"Expected one of\n{expected}")


def read_row(row: Row, form: str, has_template: bool) -> Content:
    """What a row of the named format says.

    Args:
        row: The row, as it was read.
        form: A key of `FORMATS`.
        has_template: Whether the tokenizer has a chat template; without one an Alpaca row is written out in the form
            that the Alpaca authors published.

    Raises:
        RowError: the row is not of that format.
    """
    wanted = FORMATS[form]
    missing = [key for key in wanted.needs if row.get(key) is None]
    if missing:
        keys = ", ".join(map(repr, row)) or "no keys at all"
        raise RowError(f"the row has {keys}, but lacks {', '.join(map(repr, missing))}", f"Expected {wanted.expects}.")
    return wanted.read(row, has_template)


def is_blank(row: Row) -> bool:
    """Whether a row has no value in any of its keys."""
    return not any(value.strip() if isinstance(value, str) else value for value in row.values())
