"""What a config would train on, shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.config import RunConfig, load_config
from lowrank.data.preview.gathered import preview_of
from lowrank.data.preview.preview_html import preview_html
from lowrank.data.preview.preview_text import preview_text
from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.recipes.parts.batches import SAMPLE_ROWS, batch_plan, read_batches, step_size
from lowrank.recipes.parts.preference_rows import read_preferences
from lowrank.recipes.parts.prepare import base_tokenizer
from lowrank.recipes.parts.sharing import drawing
from lowrank.recipes.parts.show import open_console
from lowrank.recipes.parts.starting import with_start
from lowrank.recipes.parts.task_rows import task_examples, task_plan
from lowrank.recipes.parts.tasked import with_task
from lowrank.training.machine.ranks import Ranks


def preview(
    config: RunConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    row: int | None = None,
    html: str | Path | None = None,
) -> None:
    """Shows the first pack (or batch), or one row, token by token, and the figures of the whole data.

    Of a stream it reads, shows and counts the first rows alone.

    Args:
        config: A config, its sections as a mapping, or the path of one. The model's weights are not loaded.
        overrides: `section.key=value`, for a mapping or a path.
        row: A row of the training data, from 1.
        html: Write a page there, instead of showing it in the terminal.

    Raises:
        InputError: the data cannot be used, there is no such row, or the page's file exists.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    html = html and expanded(html, "--html")
    if html is not None and Path(html).exists():
        raise InputError(f"{html} exists already; nothing was written", where="--html", fix="Give another file.")
    config = with_task(with_start(config))
    tokenizer = base_tokenizer(config.model, config.data.chat_template)
    ranks, drawn = Ranks(count=config.training.num_processes or 1), drawing(config.adapter, config.training)
    if config.tasked:
        task, examples, _ = task_examples(config, tokenizer)
        batches = plan = task_plan(config.training, task, examples, tokenizer, shuffle=True)
    elif config.preferring:
        task = None
        batches, _ = read_preferences(config.data, config.training, tokenizer, drawn)
        plan = batches
    else:
        task = None
        batches, _ = read_batches(config.data, config.training, tokenizer, ranks, drawn)
        plan = batch_plan(config.data, config.training, batches.sample(SAMPLE_ROWS), tokenizer, ranks, drawn)
    steps = step_size(config.data, config.training, ranks, batches).steps(batches, 0)
    shown = preview_of(
        plan,
        tokenizer,
        row=row,
        steps_per_epoch=steps,
        of_stream=config.data.streaming,
        expected=str if config.preferring else None if task is None else task.expected,
    )
    console = open_console()
    if html is None:
        console.print(preview_text(shown))
        return
    Path(html).write_text(preview_html(shown, str(config.data.train)), encoding="utf-8")
    console.print(f"wrote {html}", highlight=False)
