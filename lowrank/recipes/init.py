"""A config to begin from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lowrank.config.schema import json_schema
from lowrank.errors import InputError
from lowrank.paths import expanded

SCHEMA = "lowrank.schema.json"


def write_config(path: str | Path, template: str) -> Path:
    """Writes a commented config, and beside it the schema that its first line points editors to (no network needed).

    Args:
        path: The config's file; it must not exist.
        template: The name of a file in `lowrank/config/templates`.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    path = Path(expanded(path))
    text = (files("lowrank.config") / "templates" / f"{template}.yaml").read_text(encoding="utf-8")
    text = text.replace("$schema=schema.json", f"$schema={SCHEMA}").replace(f"configs/{template}.yaml", str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        (path.parent / SCHEMA).write_text(json_schema(), encoding="utf-8")
    except FileExistsError:
        raise InputError(f"{path} exists already", fix="Give another path: `lowrank init PATH`.") from None
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from None
    print(f"wrote {path} ({template}) and {path.parent / SCHEMA}: set model and data, then `lowrank train {path}`")
    return path
