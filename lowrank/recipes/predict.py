"""What a model that has learned a task says to texts: its labels, with their probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from lowrank.data.batches.batch import Batch
from lowrank.data.reading.formats import is_blank
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.sources import Joined, open_sources
from lowrank.errors import InputError
from lowrank.models import positions_of
from lowrank.paths import expanded
from lowrank.recipes.parts.show import open_console
from lowrank.recipes.parts.task_assess import by_row
from lowrank.recipes.parts.task_opened import open_task
from lowrank.storage.whole_file import write_whole
from lowrank.tasks.reading import Encoded
from lowrank.tasks.registry import TASKS
from lowrank.tasks.task import Prediction, Task

_SHOWN = 3


def predict(
    path: str,
    *,
    texts: Sequence[str] = (),
    file: str | Path | None = None,
    out: str | Path | None = None,
    base: str | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    task: str | None = None,
) -> list[Prediction]:
    """Predicts, and prints or writes what comes of it, in the order of the texts.

    Args:
        path: A run's folder, an adapter's or a model's.
        texts: Texts, a row each.
        file: Rows as the task was trained on; labels in them are not looked at.
        out: A .jsonl file that takes a line for each row, the row's own keys among them; it must not exist.
        base: The adapter's base, where it is not the one that the adapter names.
        batch_size: Rows at a time.
        trust_remote_code: Whether code that comes with the model may run.
        task: What the model has learned, where its files do not say.

    Raises:
        InputError: nothing is asked, a row cannot be used, the model has learned no such task, the file exists.
    """
    if bool(texts) == (file is not None):
        what = "both texts and a file are given" if texts else "there is nothing to predict"
        raise InputError(what, fix="Give --text once or more, or --file.")
    target = None if out is None else Path(expanded(out))
    if target is not None and target.exists():
        raise InputError(f"{target} exists already; nothing was written", where="--out", fix="Give another file.")
    if task not in (None, *TASKS):
        raise InputError(f"there is no task {task!r}", where="--task", fix=f"Tasks: {', '.join(TASKS)}.")
    learned, model, tokenizer = open_task(path, base=base, trust_remote_code=trust_remote_code, task=task)
    rows, places = _rows(texts, file)
    encoded = _encoded(rows, places, learned, tokenizer, positions_of(model))
    found = _predictions_of(model, learned, encoded, tokenizer.pad_token_id, batch_size)
    if target is None:
        open_console().print(_table(rows, found), highlight=False)
    else:
        lines = [{**row, **one.as_dict()} for row, one in zip(rows, found, strict=True)]
        write_whole(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        open_console().print(f"wrote {target}: {len(found):,} predictions", highlight=False)
    return found


@torch.no_grad()
def _predictions_of(
    model: Any, task: Task, encoded: Sequence[Encoded], pad_token_id: int, batch_size: int
) -> list[Prediction]:
    """What the model says to rows; those of a like length go through it together."""
    order = np.argsort([len(one.ids) for one in encoded], kind="stable")
    found: list[Prediction | None] = [None] * len(encoded)
    for begin in range(0, len(order), batch_size):
        chosen = [encoded[at] for at in order[begin : begin + batch_size]]
        batch: Batch = task.collate(
            [(one.ids, one.marks) for one in chosen], [one.payload for one in chosen], pad_token_id
        )
        outputs = by_row(
            task.outputs(model, batch.to(model.device)).cpu().numpy(), [int(one.marks.sum()) for one in chosen]
        )
        for at, said in zip(order[begin : begin + batch_size], task.predictions(outputs), strict=True):
            found[at] = said
    return [one for one in found if one is not None]


def _rows(texts: Sequence[str], file: str | Path | None) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The rows, and where each is."""
    if file is None:
        return [{"text": text} for text in texts], [f"--text {number}" for number in range(1, len(texts) + 1)]
    joined = Joined(open_sources(expanded(file), None, None))
    rows = joined.read(0, len(joined))
    kept = [at for at, row in enumerate(rows) if not is_blank(row)]
    if not kept:
        raise InputError("there are no rows", where=str(file))
    return [rows[at] for at in kept], [joined.where(at) for at in kept]


def _encoded(
    rows: Sequence[Mapping[str, Any]], places: Sequence[str], task: Task, tokenizer: Any, positions: int | None
) -> list[Encoded]:
    found = []
    for row, place in zip(rows, places, strict=True):
        try:
            one = TASKS[task.name].unlabelled(row, tokenizer, None)
        except RowError as error:
            raise InputError(error.what, where=place, fix=error.fix) from None
        if positions is not None and len(one.ids) > positions:
            raise InputError(
                f"the row has {len(one.ids)} tokens, and the model has only {positions} positions",
                where=place,
                fix="Shorten it.",
            )
        found.append(one)
    return found


def _table(rows: Sequence[Mapping[str, Any]], found: Sequence[Prediction]) -> Table:
    table = Table("text", "says", "by", box=None, padding=(0, 2, 0, 0))
    for row, one in zip(rows, found, strict=True):
        best = sorted(one.scores.items(), key=lambda item: -item[1])[:_SHOWN]
        told = ", ".join(f"{name} {score:.3f}" for name, score in best)
        table.add_row(" ".join(_asked(row).split())[:60], one.said, told)
    return table


def _asked(row: Mapping[str, Any]) -> str:
    """What a row asks, for a line of a table."""
    if row.get("text"):
        return str(row["text"])
    return " ".join(row["tokens"]) if row.get("tokens") else json.dumps(row, ensure_ascii=False)
