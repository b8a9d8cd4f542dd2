"""A conversation: what was said so far, and the commands that change it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lowrank.errors import InputError
from lowrank.paths import expanded

Messages = list[dict[str, str]]

HELP = '''/system TEXT  the system message from here on; /system alone: none
/reset        forget what was said, but for the system message
/save FILE    add the conversation to a file, as a row that can be trained on
/help         this
"""           begins a message of several lines, and ends it
//            begins a message with one /
Ctrl-C        ends an answer; at the prompt it ends the conversation, as an empty line does'''


class Talk:
    """The same questions to one model or to several, each with its own answers.

    Args:
        systems: The system message of each; None or "" for none.
        names: Who answers, written beside each saved conversation; None for a single one.
    """

    def __init__(self, systems: Sequence[str | None], names: Sequence[str] | None = None) -> None:
        self.names = names
        self.histories: list[Messages] = [
            [{"role": "system", "content": system}] if system else [] for system in systems
        ]

    def ask(self, text: str) -> None:
        """Adds a question to every history."""
        for history in self.histories:
            history.append({"role": "user", "content": text})

    def take_back(self) -> None:
        """Takes away the last question, which was not answered."""
        for history in self.histories:
            history.pop()

    def hear(self, answers: Sequence[str]) -> None:
        """Adds each one's answer."""
        for history, text in zip(self.histories, answers, strict=True):
            history.append({"role": "assistant", "content": text})

    def command(self, text: str) -> str:
        """Does what a line that begins with / says, and returns what there is to tell of it.

        Raises:
            InputError: there is no such command, it lacks its file, or the file cannot be written.
        """
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/system":
            self.histories = [
                [{"role": "system", "content": rest}] * bool(rest) + _turns(history) for history in self.histories
            ]
            return "system message set" if rest else "no system message"
        if name == "/reset" and not rest:
            self.histories = [[m for m in history if m["role"] == "system"] for history in self.histories]
            return "forgotten"
        if name == "/save":
            return self._save(rest)
        if name == "/help":
            return HELP
        raise InputError(
            f"there is no command {name}", fix="Type /help for a list, or // to begin a message with one /."
        )

    def _save(self, name: str) -> str:
        if not name:
            raise InputError("/save needs a file's name")
        if not any(map(_turns, self.histories)):
            raise InputError("nothing has been said yet")
        file = Path(expanded(name))
        by = [{}] if self.names is None else [{"answered_by": name} for name in self.names]
        rows = [{"messages": history, **who} for history, who in zip(self.histories, by, strict=True)]
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", where=str(file)) from None
        return f"added to {file}"


def _turns(history: Messages) -> Messages:
    return [message for message in history if message["role"] != "system"]
