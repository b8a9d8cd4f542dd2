"""Preference rows: read and checked, but not trained on yet."""

from __future__ import annotations

from lowrank.data.reading.conversation import Preference
from lowrank.data.reading.formats import is_blank, read_row
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.sources import Joined, Sources, open_sources
from lowrank.errors import InputError


def read_preferences(source: Sources) -> list[Preference]:
    """The prompt, the chosen and the rejected answer of each row that is not empty.

    Args:
        source: As in `load_examples`.

    Raises:
        InputError: names the file and line of a row that is not a preference.
    """
    rows = Joined(open_sources(source, "preference"))
    found = []
    for index in range(len(rows)):
        row = rows[index]
        try:
            content = None if is_blank(row) else read_row(row, "preference", has_template=True)
        except RowError as error:
            raise InputError(error.what, where=rows.where(index), fix=error.fix) from None
        if isinstance(content, Preference) and not content.is_empty:
            found.append(content)
    return found
