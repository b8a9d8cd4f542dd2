"""How the conversations of a set begin: the system prompt that they share."""

from __future__ import annotations

from collections import Counter

from lowrank.data.examples.example import Examples
from lowrank.data.reading.conversation import Conversation, Preference
from lowrank.data.reading.formats import detect, read_row
from lowrank.data.reading.judged import unlabelled
from lowrank.data.reading.sources import Joined

SAMPLE = 500
NEARLY_ALL = 0.9


def shared_system(examples: Examples, format: str | None = None) -> str | None:
    """The system prompt of nearly all conversations, as looked for in a sample; None where they share none.

    Args:
        examples: The set, of rows that can be trained on.
        format: A key of `FORMATS`, or None for the one that each source has been found to have.
    """
    rows = list(dict.fromkeys(examples.table.example_rows[examples.order].tolist()))
    rows = rows[:: max(1, len(rows) // SAMPLE)]
    counts = Counter(_system(examples, row, format) for row in rows)
    text, count = counts.most_common(1)[0]
    return text if count >= NEARLY_ALL * len(rows) else None


def _system(examples: Examples, row: int, format: str | None) -> str | None:
    found = examples.rows.formats(row, row + 1)[0] if isinstance(examples.rows, Joined) else None
    said = unlabelled(examples.rows[row])
    content = read_row(said, format or found or detect(said), True)
    content = content.chosen if isinstance(content, Preference) else content
    if not isinstance(content, Conversation) or content.messages[0]["role"] != "system":
        return None
    return content.messages[0]["content"]
