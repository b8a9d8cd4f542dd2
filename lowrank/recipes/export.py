"""An adapter for vLLM, llama.cpp, mlx-lm or peft, as one file, or on the hub."""

from __future__ import annotations

from pathlib import Path

from lowrank.paths import expanded
from lowrank.weights import ExportReport, export
from lowrank.weights.export_targets import Target
from lowrank.weights.upload import base_elsewhere, files_for_hub, refuse_no_name, upload


def export_adapter(adapter: str | Path, out: str | Path, *, to: Target, base: str | Path | None = None) -> ExportReport:
    """Exports, and prints what was changed and how the other program is called; see `lowrank.weights.exporting`."""
    report = export(expanded(adapter), expanded(out), to=to, base=base and expanded(base))
    print(f"exported to {report.out}" + ("" if report.rank is None else f", rank {report.rank}"))
    for note in report.notes:
        print(note)
    print(f"use it: {report.command}")
    return report


def upload_adapter(adapter: str | Path, name: str, *, private: bool = False, dry_run: bool = False) -> str | None:
    """Uploads an adapter's folder to the hub, and prints what goes; see `lowrank.weights.upload`.

    Args:
        adapter: Its folder.
        name: Of the repository, user/name; it is made where it is missing.
        private: Whether one that is made is private.
        dry_run: Only print; nothing is asked of the network.

    Returns:
        The repository's address; None from a dry run.
    """
    folder = Path(expanded(adapter))
    refuse_no_name(name)
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files_for_hub(folder)}
    total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
    print(f"{'would upload' if dry_run else 'uploading'} {total}, to {name}:")
    for file, size in sizes.items():
        print(f"  {file}  {size:,} bytes")
    if base := base_elsewhere(folder):
        print(f"The adapter names its base by a folder, {base}: who downloads it has to name the base.")
    if dry_run:
        print("nothing was uploaded; to do it, leave out --dry-run")
        return None
    address, notes = upload(folder, name, private=private)
    for note in notes:
        print(note)
    print(f"uploaded to {address}")
    return address
