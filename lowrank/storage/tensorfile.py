"""A safetensors file as the list of its tensors: headers read without trust, bytes read and written by offset.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, a JSON header
`{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}`, and one buffer that the tensors fill without
gaps. `safetensors` itself maps files into memory; reading by offset keeps a merge's memory at one block of rows.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.errors import LFS_POINTER, InputError

MAX_HEADER = 100_000_000  # the limit of the safetensors library

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_BITS = {code: dtype.itemsize * 8 for code, dtype in TORCH_DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of data."""
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch; InputError for the sub-byte formats that torch has no dtype for."""
        if self.dtype not in TORCH_DTYPES:
            raise InputError(f"tensor {self.name!r} has the dtype {self.dtype}, which cannot be computed with")
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been checked: entries in the order of their bytes."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        entry = self.entries[name]
        return self._read(entry, 0, entry.size).view(entry.shape)

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included) of a tensor with at least one dimension."""
        entry = self.entries[name]
        row = entry.size // max(1, entry.shape[0])
        return self._read(entry, first * row, (last - first) * row).view(last - first, *entry.shape[1:])

    def read_bytes(self, name: str, first: int, last: int) -> torch.Tensor:
        """Bytes `first` to `last` (not included) of a tensor's data, as uint8."""
        with self.path.open("rb") as file:
            buffer = torch.empty(last - first, dtype=torch.uint8)
            return read_bytes(file.fileno(), self.entries[name].start + first, buffer)

    def _read(self, entry: Entry, offset: int, size: int) -> torch.Tensor:
        return self.read_bytes(entry.name, offset, offset + size).view(entry.torch_dtype)


def open_tensors(path: Path) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    Raises:
        InputError: The file is missing, truncated, longer than its header says, or its header is not valid JSON, is
            larger than the file, lists overlapping tensors, gaps, duplicate names, or shapes that do not fit sizes.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, f"it has {size} bytes, less than the smallest file")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER or length + 8 > size:
                _refuse_pointer(prefix + file.read(len(LFS_POINTER)), path)
                raise _damaged(path, f"its header claims {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    header = parse_json_object(raw, path)
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    base = 8 + length
    entries = sorted((_parse_entry(name, spec, base, path) for name, spec in header.items()), key=_by_place)
    at = base
    for entry in entries:
        if entry.start != at:
            raise _damaged(path, f"the bytes of tensor {entry.name!r} overlap another's or leave a gap")
        at = entry.end
    if at != size:
        raise _damaged(path, f"its tensors end at byte {at}, the file at byte {size}")
    return TensorFile(path, {entry.name: entry for entry in entries}, metadata)


def parse_json_object(raw: bytes, path: Path) -> dict[str, object]:
    """A JSON object without duplicate keys; InputError naming `path` for anything else."""
    _refuse_pointer(raw, path)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise _damaged(path, "its JSON is nested too deeply") from error
    except ValueError as error:
        raise _damaged(path, f"its JSON cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise _damaged(path, "its JSON is not an object")
    return value


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The header (with its length, padded to 8 bytes) of a file that holds (name, dtype code, shape) in this order.

    Returns:
        The bytes that open the file, and where each tensor's data goes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    placed, at = [], 0
    for name, dtype, shape in tensors:
        end = at + _byte_size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        placed.append(Entry(name, dtype, tuple(shape), at, end))
        at = end
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    base = 8 + len(body)
    return struct.pack("<Q", len(body)) + body, {
        e.name: Entry(e.name, e.dtype, e.shape, base + e.start, base + e.end) for e in placed
    }


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file whose bytes follow from its content alone: safetensors' own writer shuffles metadata."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    header, places = encode_header(
        ((name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()), metadata
    )
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        for name, tensor in stored.items():
            write_bytes(file.fileno(), places[name].start, tensor)
        os.fsync(file.fileno())


def read_bytes(fd: int, offset: int, buffer: torch.Tensor) -> torch.Tensor:
    """Fills a contiguous uint8 tensor from `offset` of an open file, and returns it."""
    view, done = buffer.numpy().data, 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise InputError(f"the file ends at byte {offset + done}, in the middle of a tensor")
        done += count
    return buffer


def write_bytes(fd: int, offset: int, tensor: torch.Tensor) -> None:
    """Writes a contiguous CPU tensor's bytes at `offset` of an open file."""
    view, done = tensor.reshape(-1).view(torch.uint8).numpy().data, 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _parse_entry(name: str, spec: object, base: int, path: Path) -> Entry:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header's entry for {name!r} is not a dtype, a shape and two offsets")
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has no list of sizes, or not two offsets")
    start, end = offsets
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, end)):
        raise _damaged(path, f"tensor {name!r} has a size or an offset that is not a whole number")
    if end - start != _byte_size(dtype, shape):
        raise _damaged(path, f"tensor {name!r} of shape {shape} and dtype {dtype} does not fit {end - start} bytes")
    return Entry(name, dtype, tuple(shape), base + start, base + end)


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(path, "its metadata is not a table of strings")
    return value


def _byte_size(dtype: str, shape: Iterable[int]) -> int:
    bits = math.prod(shape) * _BITS[dtype]
    return -(-bits // 8)


def _by_place(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.end


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _refuse_pointer(raw: bytes, path: Path) -> None:
    if raw.startswith(LFS_POINTER):
        raise InputError(
            "the file is a Git LFS pointer: the text that stands for a file that was not fetched",
            where=str(path),
            fix=f"Fetch it: git -C {path.parent} lfs pull.",
        )


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"the file is damaged or not what its name says: {why}", where=str(path))
