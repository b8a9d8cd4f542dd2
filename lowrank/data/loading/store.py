"""Token tables on disk: one flat file for each array, written chunk by chunk and mapped into memory to be read.

A cached table lies in a folder named by a hash of all that it depends on: the rows, the tokenizer, its chat template,
the options, and the versions of the libraries that render and tokenise. A change of any gives another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from lowrank.data.examples.token_table import TokenTable
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.template import writes_date
from lowrank.paths import cache_folder

# Raised whenever the same rows give other tokens than before, or the files another layout.
VERSION = 3
UNUSED_DAYS = 30
# What a table's folder holds beside its arrays: how many bytes each has.
SIZES = "sizes.json"
PARTIAL = ".partial"

DTYPES: dict[str, np.dtype] = {
    "ids": np.dtype(np.int32),
    "supervised": np.dtype(np.bool_),
    "starts": np.dtype(np.int64),
    "example_rows": np.dtype(np.int64),
    "cuts": np.dtype(np.uint8),
    "digests": np.dtype(np.uint64),
    "row_keys": np.dtype(np.uint64),
    "outcomes": np.dtype(np.uint8),
    "control_text": np.dtype(np.bool_),
    "row_lengths": np.dtype(np.int64),
    "uneven": np.dtype(np.bool_),
    "masked_turns": np.dtype(np.int64),
    "unasked": np.dtype(np.bool_),
}
assert [field.name for field in fields(TokenTable)] == list(DTYPES)


def cache_root() -> Path:
    """Where cached tables lie."""
    return cache_folder() / "tokens"


def cache_key(rows_fingerprint: str, tokenizer: PreTrainedTokenizerBase, options: Options) -> str:
    """The name of the folder for such rows, tokenizer and options."""
    template = json.dumps(tokenizer.chat_template)
    told = [
        f"{VERSION} {transformers.__version__} {tokenizers.__version__}",
        rows_fingerprint,
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        str(tokenizer.split_special_tokens),
        template,
        (options.today or time.strftime("%Y-%m-%d")) if writes_date(tokenizer) else "",
        json.dumps({**asdict(options), "today": None, "bad_rows": None}),
    ]
    return hashlib.blake2b("\0".join(told).encode(), digest_size=16).hexdigest()


def open_table(folder: Path) -> TokenTable | None:
    """A table that was written before, mapped into memory; None if there is none, or not all of it."""
    try:
        expected = json.loads((folder / SIZES).read_bytes())
        if expected != _sizes(folder):
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(folder)
        arrays = {}
        for name, dtype in DTYPES.items():
            empty = expected[name] == 0
            arrays[name] = np.empty(0, dtype) if empty else np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
    except (OSError, ValueError):
        return None
    return TokenTable(**arrays)


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / f"{name}.bin").stat().st_size for name in DTYPES}


class TableWriter:
    """Writes a table chunk by chunk into a temporary folder that takes its place when the `with` block is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = 0

    def __enter__(self) -> TableWriter:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(mkdtemp(prefix=f"{self._folder.name}.", suffix=PARTIAL, dir=self._folder.parent))
        self._files = {name: (self._temporary / f"{name}.bin").open("wb") for name in DTYPES}
        self._files["starts"].write(np.zeros(1, dtype=DTYPES["starts"]).tobytes())
        return self

    def append(self, table: TokenTable) -> None:
        """Add the examples of the next rows; their `starts` count from their own beginning."""
        for name, dtype in DTYPES.items():
            array = getattr(table, name)
            assert array.dtype == dtype, f"{name} is {array.dtype}"
            array = table.starts[1:] + self._tokens if name == "starts" else array
            self._files[name].write(array.tobytes())
        self._tokens += int(table.starts[-1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for file in self._files.values():
                file.close()
            if error is None:
                (self._temporary / SIZES).write_text(json.dumps(_sizes(self._temporary)))
                self._put_in_place()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _put_in_place(self) -> None:
        if open_table(self._folder) is not None:  # another process was faster, with the same content
            return
        shutil.rmtree(self._folder, ignore_errors=True)  # what is there is not whole
        try:
            self._temporary.rename(self._folder)
        except OSError:
            if open_table(self._folder) is None:
                raise


def forget_unused(root: Path) -> None:
    """Delete tables that no run has opened for `UNUSED_DAYS`, and what a killed writer left a day ago."""
    for folder in root.iterdir():
        days = 1 if folder.name.endswith(PARTIAL) else UNUSED_DAYS
        with suppress(OSError):  # another process forgets it too
            if time.time() - folder.stat().st_mtime > days * 24 * 3600:
                shutil.rmtree(folder, ignore_errors=True)
