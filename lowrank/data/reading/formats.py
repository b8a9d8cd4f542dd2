"""The formats rows come in, one reader each: from the keys of a row to what the row says.

A new format is one function here and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.data.reading.conversation import Conversation, Plain, Preference, conversation
from lowrank.data.reading.marks import refuse_marks
from lowrank.data.reading.messages import Message, kind, parsed
from lowrank.data.reading.preferences import margin_of, prompt_and_answers
from lowrank.data.reading.row_error import RowError

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
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
"""The columns that say what the system turn is."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format of rows.

    Attributes:
        expects: What a row looks like, for error messages.
        needs: The keys that a row must have to be of this format.
        read: From a row to what it says; the flag tells whether there is a chat template.
        names: For keys that other data sets call otherwise, their names; the key's own is among them.
        optional: Further keys that it may have.
    """

    expects: str
    needs: tuple[str, ...]
    read: Callable[[Row, bool], Content]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """All keys of its own."""
        return list(dict.fromkeys((*self.needs, *self.names, *self.optional)))

    @property
    def other_names(self) -> list[str]:
        """What data sets call its keys."""
        return [name for names in self.names.values() for name in names]


def _messages(row: Row, has_template: bool) -> Content:
    return conversation(row["messages"], _tools_of(row), system=_system_of(row))


def _sharegpt(row: Row, has_template: bool) -> Content:
    return conversation(row["conversations"], _tools_of(row), system=_system_of(row))


def _alpaca(row: Row, has_template: bool) -> Content:
    instruction, extra, output = (_text(row, key) for key in ("instruction", "input", "output"))
    if not has_template:
        _refuse_context(row)
        form = ALPACA_WITH_INPUT if extra.strip() else ALPACA_WITHOUT_INPUT
        return Plain(form.format(instruction=instruction, input=extra), output)
    messages: list[Message] = []
    for asked, answered in _history(row):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return conversation(messages, _tools_of(row), system=_system_of(row), completion_from=len(messages) - 1)


def _history(row: Row) -> list[Any]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("the history is not a list of pairs", "Expected [[question, answer], ...].")
    return history


def _prompt_completion(row: Row, has_template: bool) -> Content:
    return _continued(row, "completion", has_template)


def _continued(row: Row, key: str, has_template: bool) -> Conversation | Plain:
    """A prompt and what follows it, both texts or both lists of messages.

    Texts stand as they are, without a chat template, unless the row has a column for a system turn or for tools: those
    have no place but in one.
    """
    prompt, completion, tools, system = row["prompt"], row[key], _tools_of(row), _system_of(row)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not has_template:
            _refuse_context(row)
        if not has_template or (system is None and not tools):
            return Plain(prompt, completion)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return conversation(turns, tools, system=system, completion_from=1)
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], tools, system=system, completion_from=len(prompt))
    kinds = f"the prompt is {kind(prompt)}, the {key} {kind(completion)}"
    raise RowError(f"prompt and {key} are neither both text nor both lists of messages: {kinds}", AS_TEXT)


def _plain_text(row: Row, has_template: bool) -> Content:
    _refuse_context(row)
    return Plain("", _text(row, "text"))


def _preference(row: Row, has_template: bool) -> Content:
    prompt, answers = prompt_and_answers(row)
    read = []
    for name, answer in answers:
        one = _continued({**row, "prompt": prompt, name: answer}, name, has_template)
        if one.is_empty:
            raise RowError(f"the {name} answer is empty", "Write it, or remove the row.")
        read.append(one)
    chosen, rejected, *others = read
    return Preference(chosen, rejected, tuple(others), margin_of(row))


def _system_of(row: Row) -> str | None:
    """What a column of its own says the system turn is; None where there is no such column, or nothing in it.

    Raises:
        RowError: it is no text, or two columns differ.
    """
    found = {key: _text(row, key) for key in SYSTEM if row.get(key) is not None}
    said = {text.strip(): text for text in found.values() if text.strip()}
    if len(said) > 1:
        raise RowError(f"the columns {' and '.join(map(repr, found))} say different things", "Leave one of them out.")
    return next(iter(said.values()), None)


def _tools_of(row: Row) -> Any:
    """The tools of a row, which the older API calls functions.

    Raises:
        RowError: it has both.
    """
    tools, functions = (parsed(row.get(key) or None, f"the {key}") for key in ("tools", "functions"))
    if tools and functions:
        raise RowError("the row has both 'tools' and 'functions'", "Leave the older one out.")
    if isinstance(functions, list):
        return [{"type": "function", "function": function} for function in functions]
    return tools or functions


def _refuse_context(row: Row) -> None:
    """Refuse what has a place only in a chat template."""
    for what, said in (("a system turn", _system_of(row)), ("tools", _tools_of(row))):
        if said:
            raise RowError(
                f"the row has {what}, and no chat template goes around it",
                "Write the row as messages, with a tokenizer or data.chat_template that knows them.",
            )


AS_TEXT = 'Write it as text, in quotes: "3" and not 3.'


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} is not text but {value!r:.60}", AS_TEXT)
    return value


FORMATS: dict[str, Format] = {
    "messages": Format('{"messages": [{"role": ..., "content": ...}, ...]}', ("messages",), _messages),
    "sharegpt": Format('{"conversations": [{"from": "human", "value": ...}, ...]}', ("conversations",), _sharegpt),
    "preference": Format(
        '{"prompt": ..., "chosen": ..., "rejected": ...}',
        ("chosen", "rejected"),
        _preference,
        optional=("prompt", "margin"),
    ),
    "prompt_completion": Format(
        '{"prompt": ..., "completion": ...}',
        ("prompt", "completion"),
        _prompt_completion,
        {
            "prompt": ("prompt", "question", "query", "input"),
            "completion": ("completion", "answer", "response", "output"),
        },
    ),
    "alpaca": Format(
        '{"instruction": ..., "input": ..., "output": ...}',
        ("instruction", "output"),
        _alpaca,
        {
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response", "answer", "completion"),
        },
        optional=("history",),
    ),
    "text": Format('{"text": ...}', ("text",), _plain_text),
}


# Keys that change what a row teaches and that nothing here reads, and what to do about each.
UNREAD = {
    "chat_template_kwargs": "Give data.chat_template a template that does so by itself.",
    "documents": "Write them into a message.",
}
# Keys that say something beside a question and its answer.
BESIDE = ("context", "history", "reasoning")


def detect(row: Row) -> str:
    """The format of a row, by its keys.

    Raises:
        RowError: it fits none; the message lists its keys and what was expected.
    """
    for name, form in FORMATS.items():
        if all(row.get(key) is not None for key in form.needs):
            return name
    for name in ("alpaca", "prompt_completion"):
        found = _called(row, FORMATS[name])
        if all(found.get(key) for key in FORMATS[name].needs):
            _renamed(row, FORMATS[name])
            return name
    keys = ", ".join(map(repr, row)) or "no keys at all"
    expected = "\n".join(f"  {name}: {form.expects}" for name, form in FORMATS.items())
    raise RowError(
        f"the row has {keys}, which fits none of the known formats",
        f"Say which is which by data.columns, such as {{prompt: question, completion: answer}}. Known are\n{expected}",
    )


def _called(row: Row, form: Format) -> dict[str, list[str]]:
    """For each key that data sets call otherwise, the keys of the row that can be meant; its own if it is there."""
    there = {key: [name for name in names if row.get(name) is not None] for key, names in form.names.items()}
    return {key: [key] if key in names else names for key, names in there.items()}


def _renamed(row: Row, form: Format) -> Row:
    """The row with the format's own keys.

    Raises:
        RowError: it is not clear which of its keys are meant.
    """
    found = _called(row, form)
    taken = {name for names in found.values() for name in names}
    if any(row.get(key) is None for key in form.needs):
        doubled = next((names for names in found.values() if len(names) > 1), None)
        known = {name for each in FORMATS.values() for names in each.names.values() for name in names}
        left = [name for name in (*sorted(known), *BESIDE) if name not in taken and row.get(name) not in (None, "", [])]
        if doubled or left:
            both = " and ".join(map(repr, doubled or [next(iter(found.values()))[0], left[0]]))
            raise RowError(
                f"the row has {both}, and it is not clear what they are",
                "Say which is which by data.columns, such as {prompt: question, completion: answer}.",
            )
    others = {key: value for key, value in row.items() if key not in taken}
    return {**{key: row[names[0]] for key, names in found.items() if names}, **others}


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
    named = ", ".join(map(repr, row)) or "no keys at all"
    row = _renamed(row, wanted) if wanted.names else row
    missing = [key for key in wanted.needs if row.get(key) is None]
    if missing:
        raise RowError(f"the row has {named}, but lacks {', '.join(map(repr, missing))}", f"Expected {wanted.expects}.")
    for key, fix in UNREAD.items():
        if row.get(key) not in (None, "", [], {}):
            raise RowError(f"the row has the key {key!r}, which is not read", fix)
    refuse_marks(row)
    return wanted.read(row, has_template)


def is_blank(row: Row) -> bool:
    """Whether a row has no value in any of its keys."""
    return not any(value.strip() if isinstance(value, str) else value for value in row.values())
