"""Where a model or an adapter lies: a local folder, or the hub's copy of a repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lowrank.errors import InputError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_folder(name_or_path: str | Path, what: str = "model", revision: str | None = None) -> Path:
    """The folder itself, or the hub's copy of a repository of that name (downloaded when it is not in the cache).

    Raises:
        InputError: There is neither.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(name_or_path)
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise InputError(f"there is no {what} folder {name}")
    at = "" if revision is None else f" at revision {revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"there is no {what} {name!r}{at}: no such folder, and the hub did not give it ({type(error).__name__})",
            fix="Give the path of a folder, or check the name and the connection.",
        ) from error
