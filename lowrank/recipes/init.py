"""A config that runs: from rows, a model's name and the machine at hand, every value with its reason."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lowrank.config import load_config
from lowrank.config.assignments import override
from lowrank.config.document import read_document
from lowrank.config.schema import json_schema
from lowrank.config.sections import adapter_sections
from lowrank.errors import InputError
from lowrank.models import load_tokenizer
from lowrank.paths import as_written, expanded
from lowrank.recipes.check import check
from lowrank.recipes.parts.tasked import task_of_rows
from lowrank.recipes.proposal.base import base_of
from lowrank.recipes.proposal.machine import Machine, machine_at_hand
from lowrank.recipes.proposal.page import as_yaml
from lowrank.recipes.proposal.row_figures import RowFacts, rows_of
from lowrank.recipes.proposal.rules import Goal, Setting, paced, placed, propose

SCHEMA = "lowrank.schema.json"


def init(
    data: str | Path,
    model: str | Path,
    out: str | Path = "run.yaml",
    *,
    held_out: str | Path | None = None,
    goal: Goal = "quality",
    overrides: Sequence[str] = (),
    machine: Machine | None = None,
    checked: bool = True,
) -> Path:
    """Looks at the rows, at the model's config (not its weights) and at the machine, and writes a config that runs.

    Args:
        data: The training rows: a file, a folder, a pattern, or a name on the hub.
        model: A folder with a saved model, or a name on the hub.
        out: The config's file; it must not exist. The schema that editors check it with goes beside it.
        held_out: Rows to evaluate on; by default a share of the training rows.
        goal: "quality", "memory" or "speed": what comes first where two cannot both be had.
        overrides: `section.key=value`, for what is decided already.
        machine: Where it shall run; by default this one.
        checked: Whether `lowrank check` is run on it at the end.

    Returns:
        The config's path.

    Raises:
        InputError: the rows or the model cannot be used, the model does not fit the machine, the file exists.
    """
    path, data, model = Path(expanded(out)), expanded(data), expanded(model)
    held_out = None if held_out is None else expanded(held_out)
    if path.exists():
        raise InputError(f"{path} exists already", fix="Give another path: `lowrank init DATA PATH`.")
    base = base_of(model, task=task_of_rows(data))
    rows = rows_of(data, load_tokenizer(model))
    machine = machine or machine_at_hand()
    settings = propose(
        base,
        rows,
        machine,
        held_out=held_out,
        goal=goal,
        output=_unused(Path(data).name.partition(".")[0] or "run"),
    )
    head = [
        f"yaml-language-server: $schema={SCHEMA}",
        f"{rows.path} on {base.name}, for {machine}; what comes first: {goal}.",
        "",
        f"  lowrank train {path}",
    ]
    _write(path, settings, rows, head, overrides)
    print(f"wrote {path}, each value with its reason, and {path.parent / SCHEMA} for editors")
    if checked:
        check(path)  # its last line is the command
    else:
        print(f"next: lowrank check {shlex.quote(str(path))}")
    return path


def _unused(name: str) -> str:
    """A folder below runs/ that no run has taken yet."""
    folder, number = Path("runs") / name, 2
    while folder.exists() or Path(f"{folder}-merged").exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return as_written(str(folder))


def _write(path: Path, settings: list[Setting], rows: RowFacts, head: list[str], overrides: Sequence[str]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(as_yaml(paced(settings, rows), head))
        (path.parent / SCHEMA).write_text(json_schema(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from None
    try:
        if overrides:
            asked = paced(_with(settings, path, overrides), rows)
            path.write_text(as_yaml(asked, head), encoding="utf-8")
        load_config(path)
    except BaseException:
        path.unlink()
        raise


def _with(settings: list[Setting], path: Path, overrides: Sequence[str]) -> list[Setting]:
    """The settings with what was asked for in their place, or at the end of their section."""
    document = read_document(path)
    for assignment in overrides:
        override(document, assignment)
    if document.problems:
        raise InputError("\n".join(map(str, document.problems)))
    settings = _of_method(settings, document.values["adapter"]["method"])
    for assignment in overrides:
        section, _, key = assignment.partition("=")[0].partition(".")
        key = key.partition(".")[0]
        settings = placed(settings, Setting(section, key, document.values[section][key], "as asked"))
    return settings


def _of_method(settings: list[Setting], method: object) -> list[Setting]:
    """The settings without those that a method has no use for; full fine-tuning takes a rate of its own."""
    methods = adapter_sections()
    if not isinstance(method, str) or method not in methods:
        return settings  # the config's check names those that are
    settings = [one for one in settings if one.section != "adapter" or one.key in methods[method].model_fields]
    if method != "full":
        return settings
    rate = next(one.value for one in settings if one.key == "learning_rate")
    return placed(
        settings, Setting("training", "learning_rate", float(f"{rate / 10:.1e}"), "a tenth of what adapters learn with")
    )
