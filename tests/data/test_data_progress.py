"""Progress is shown for what takes over two seconds, and for nothing else."""

from __future__ import annotations

import sys
from io import StringIO

import pytest

from lowrank.data.loading import reading_progress as module
from lowrank.data.loading.reading_progress import LINE_EVERY, PATIENCE, progress


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time that the progress sees: a list whose one number a test moves on."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def shown(monkeypatch, stream, clock, seconds):
    """What ten steps write that take so many seconds each."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with progress("tokenising rows", 10_000) as advance:
        for _ in range(10):
            clock[0] += seconds
            advance(1_000)
    return stream.getvalue()


def test_what_is_quick_shows_nothing(monkeypatch, clock):
    assert shown(monkeypatch, StringIO(), clock, PATIENCE / 11) == ""
    assert "tokenising rows" not in shown(monkeypatch, Terminal(), clock, PATIENCE / 11)


def test_a_terminal_gets_a_bar(monkeypatch, clock):
    text = shown(monkeypatch, Terminal(), clock, PATIENCE / 5)
    assert "tokenising rows" in text
    assert "/10000" in text


def test_a_log_gets_a_line_now_and_then(monkeypatch, clock):
    lines = shown(monkeypatch, StringIO(), clock, LINE_EVERY / 3).splitlines()
    assert lines == [f"tokenising rows: {done:,} of 10,000" for done in (3_000, 6_000, 9_000)]
