"""What a config would train on, shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.config import RunConfig, load_config
from lowrank.data.preview import preview_of
from lowrank.data.preview_html import preview_html
from lowrank.data.preview_text import preview_text
from lowrank.errors import InputError
from lowrank.recipes.prepare import base_tokenizer, batch_plan, read_examples
from lowrank.recipes.show import open_console


def preview(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    *,
    row: int | None = None,
    html: str | Path | None = None,
) -> None:
    """Shows the first pack (or batch), or one row, token by token, and the figures of the whole data.

    Args:
        config: A config, or the path of one. The model's weights are not loaded.
        overrides: `section.key=value`, for a path.
        row: A row of the training data, from 1.
        html: Write a page there, instead of showing it in the terminal.

    Raises:
        InputError: the data cannot be used, there is no such row, or the page's file exists.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    if html is not None and Path(html).exists():
        raise InputError(f"{html} exists already; nothing was written", where="--html", fix="Give another file.")
    tokenizer = base_tokenizer(config)
    plan = batch_plan(config, read_examples(config, tokenizer)[0], tokenizer, shuffle=True)
    shown = preview_of(plan, tokenizer, row=row, batches_per_step=config.training.gradient_accumulation_steps)
    console = open_console()
    if html is None:
        console.print(preview_text(shown))
        return
    Path(html).write_text(preview_html(shown, str(config.data.train)), encoding="utf-8")
    console.print(f"wrote {html}", highlight=False)
