"""The bytes of a data file: mapped or decompressed, and refused where they are something else than the name says."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import mmap
import shutil
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lowrank.data.reading.row_error import RowError
from lowrank.errors import LFS_POINTER, InputError

Content = bytes | mmap.mmap

# Smaller files are read whole: a file that is rewritten while it is mapped ends the process that looks at it.
MAP_FROM = 64 * 2**20
BLOCK = 2**16

TEXTS = (".txt", ".md")
BEGINNINGS: tuple[tuple[bytes, tuple[str, ...], str], ...] = (
    (b"\x1f\x8b", (".gz",), "is compressed (gzip)"),
    (b"BZh", (".bz2",), "is compressed (bzip2)"),
    (b"\xfd7zXZ\x00", (".xz",), "is compressed (xz)"),
    (b"\x28\xb5\x2f\xfd", (".zst", ".zstd"), "is compressed (zstd)"),
    (b"PK\x03\x04", (), "is a zip archive"),
    (b"\xff\xfe", (), "is UTF-16 text, not UTF-8"),
    (b"\xfe\xff", (), "is UTF-16 text, not UTF-8"),
    (b"PAR1", (".parquet",), "is a Parquet file"),
    (b"ARROW1", (".arrow", ".feather"), "is an Arrow file"),
    (b"<!doctype html", TEXTS, "is a web page"),
    (b"<html", TEXTS, "is a web page"),
)
"""How files begin that are taken for something else: the beginning, the endings that fit, what such a file is."""


def _arrow(codec: str) -> Callable[[Path], IO[bytes]]:
    def opened(path: Path) -> Any:
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec))

    return opened


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _arrow("zstd"),
    ".zstd": _arrow("zstd"),
    ".lz4": _arrow("lz4"),
}
"""The endings of compressed files, and what reads each."""


def kind_of(path: Path) -> str:
    """The ending that says what is in a file, in lower case: `.jsonl` of `rows.jsonl.gz`."""
    name = path.name.lower()
    packing = Path(name).suffix
    return Path(name.removesuffix(packing)).suffix if packing in COMPRESSED else packing


def content_of(path: Path) -> Content:
    """The bytes of a file, decompressed.

    Raises:
        InputError: it cannot be read, or its bytes are not what its ending says.
    """
    if path.suffix.lower() in COMPRESSED:
        with _open_bytes(path) as packed, tempfile.TemporaryFile() as whole:
            with told_of(path):
                shutil.copyfileobj(packed, whole, 2**20)
            return _content(whole, whole.tell())
    with _open_bytes(path) as file:
        return _content(file, path.stat().st_size)


def _content(file: Any, size: int) -> Content:
    file.seek(0)
    return file.read() if size < MAP_FROM else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _open_bytes(path: Path) -> IO[bytes]:
    """A file to read from its beginning, decompressed on the way.

    Raises:
        InputError: it cannot be read, or its bytes are not what its ending says.
    """
    with told_of(path):
        with path.open("rb") as file:
            _check_beginning(path, file.read(len(LFS_POINTER)), path.suffix.lower())
        if path.suffix.lower() not in COMPRESSED:
            return path.open("rb")
        with COMPRESSED[path.suffix.lower()](path) as file:
            _check_beginning(path, file.read(len(LFS_POINTER)), kind_of(path))
        return COMPRESSED[path.suffix.lower()](path)


def _check_beginning(path: Path, head: bytes, ending: str) -> None:
    if head.startswith(LFS_POINTER):
        raise InputError(
            "the file is a Git LFS pointer: the text that stands for a file that was not fetched",
            where=str(path),
            fix="Fetch it: git lfs pull.",
        )
    for beginning, endings, what in BEGINNINGS:
        if head.lower().startswith(beginning.lower()) and ending not in endings:
            fix = f"Name it {path.name}{endings[0]}." if endings and endings != TEXTS else None
            raise InputError(f"the file {what}", where=str(path), fix=fix)


@contextmanager
def told_of(path: Path) -> Generator[None]:
    """Turns what goes wrong in reading a file into an `InputError` that names it."""
    try:
        yield
    except EOFError:
        raise InputError("the compressed file is cut off", where=str(path)) from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None


def glance(path: Path) -> str:
    """A hash of a file's bytes, or, of a large file, of its size and of blocks that are spread over it.

    It tells a file that was rewritten in less time than a stream of it takes to begin; a single row that was changed in
    a large file can escape it.
    """
    size = path.stat().st_size
    count = -(-size // BLOCK) if size < MAP_FROM else MAP_FROM // BLOCK
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with told_of(path), path.open("rb") as file:
        for at in range(count):
            file.seek(at * max(size - BLOCK, 0) // max(count - 1, 1) if size >= MAP_FROM else at * BLOCK)
            found.update(file.read(BLOCK))
    return found.hexdigest()


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file one after another, each with its line break; none is kept."""
    with _open_bytes(path) as file:
        while True:
            with told_of(path):
                line = file.readline()
            if not line:
                return
            yield line


def decoded(content: bytes, name: str, first_line: int = 1) -> str:
    """UTF-8 bytes as text, without the mark that some editors put first.

    Args:
        content: The bytes.
        name: The file, for the message.
        first_line: The number of the line that `content` begins with.

    Raises:
        InputError: the bytes are no UTF-8; names file and line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(
            f"the byte {content[error.start]:#04x} is not UTF-8 text",
            where=f"{name}:{line}",
            fix="Write the file as UTF-8: iconv -f latin1 -t utf-8 (or -f cp1252, utf-16 ...) old > new.",
        ) from None


def parsed_json(text: str, what: str) -> Any:
    """The value of a JSON text.

    Raises:
        RowError: it is not valid JSON, or deeper or longer than can be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise RowError(f"{what} not valid JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise RowError(f"{what} nested too deeply to be read") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise RowError(f"{what} not readable: {str(error).partition(';')[0]}", "Write such a number as text.") from None
