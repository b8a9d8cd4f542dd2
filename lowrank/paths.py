"""What a written path stands for: one rule for configs, the command line and variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lowrank.errors import InputError

_VARIABLE = re.compile(r"\$(?:\$|\{(?P<braced>[^}]*)\}|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/([0-9a-f]{40})/?$")


def expanded(
    path: str | os.PathLike[str], where: str | None = None, environment: Mapping[str, str] = os.environ
) -> str:
    """The path with `~` and `~user` at its beginning, `$NAME` and `${NAME}` anywhere, replaced; `$$` is a dollar sign.

    Args:
        path: As a person wrote it.
        where: The key, argument or variable that it comes from.
        environment: The variables.

    Raises:
        InputError: there is no such variable or user, or the path is empty or no text.
    """
    written = os.fspath(path)

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name = found["bare"] or found["braced"]
        if not _NAME.fullmatch(name):
            raise InputError(f"{found[0]} in {written!r} is not the name of a variable", where=where, fix=_WRITTEN)
        if not environment.get(name):
            state = "is empty" if name in environment else "is not set"
            raise InputError(
                f"the variable {name} in {written!r} {state}", where=where, fix="Set it, or write $$ for a dollar sign."
            )
        return environment[name]

    whole = _from_home(written, where, environment) + _VARIABLE.sub(value, _behind_home(written))
    if not whole:
        raise InputError("the path is empty", where=where)
    if "\0" in whole:
        raise InputError(f"the path {whole!r} holds a NUL, which no file's name can", where=where)
    if any("\ud800" <= letter <= "\udfff" for letter in whole):
        raise InputError(f"the path {whole!r} holds bytes that are not UTF-8", where=where, fix="Rename it.")
    return whole


_WRITTEN = "Write $NAME or ${NAME}, and $$ for a dollar sign."


def as_written(path: str) -> str:
    """What `expanded` reads as `path`."""
    doubled = path.replace("$", "$$")
    return f"./{doubled}" if doubled.startswith("~") else doubled


def _home_part(written: str) -> str:
    return written.partition("/")[0] if written.startswith("~") else ""


def _behind_home(written: str) -> str:
    return written[len(_home_part(written)) :]


def _from_home(written: str, where: str | None, environment: Mapping[str, str]) -> str:
    part = _home_part(written)
    if not part:
        return ""
    home = environment.get("HOME") if part == "~" else None
    home = home or os.path.expanduser(part)
    if home == part:
        whose = "no home folder is known" if part == "~" else f"there is no user {part[1:]!r}"
        raise InputError(f"{whose} for {written!r}", where=where, fix=f"Write ./{part} for a name that begins with ~.")
    return home.rstrip("/") if _behind_home(written) else home


def cache_folder() -> Path:
    """Where lowrank keeps what it can make again: `$LOWRANK_CACHE`, or `~/.cache/lowrank`."""
    return Path(expanded(os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank", "LOWRANK_CACHE"))


def hub_commit(name_or_path: str | Path, revision: str | None = None) -> str | None:
    """The commit of a hub's repository that lies in the hub's cache; None for any other folder.

    Args:
        name_or_path: A repository's name, or its folder in the cache.
        revision: A branch, a tag or a commit; for a name.
    """
    place = Path(name_or_path)
    if not place.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            file = try_to_load_from_cache(str(name_or_path), "config.json", revision=revision)
        except HFValidationError:
            return None
        if not isinstance(file, str):
            return None
        place = Path(file).parent
    found = _SNAPSHOT.search(place.as_posix())
    return found[1] if found else None
