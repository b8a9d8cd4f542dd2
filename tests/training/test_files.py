"""A file is there as a whole or as it was before."""

from __future__ import annotations

import errno

import pytest

from lowrank.storage import whole_file as files
from lowrank.storage.whole_file import unfinished, write_whole


def test_it_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "config.yaml"
    unfinished(path).write_text("left by a death")
    for text in ("first", "zweiter ümlaut"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "config.yaml"
    write_whole(path, "before")
    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
