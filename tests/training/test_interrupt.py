"""Signals: the first one asks, the second one is the interpreter's own."""

from __future__ import annotations

import os
import signal

import pytest

from lowrank.training.callbacks.signals import saving, stopping_softly
from lowrank.training.run import Run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_next_is_as_before(tmp_path, number, capsys):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    run = Run(None, None, None, None, tmp_path, 3)  # type: ignore[arg-type]
    with stopping_softly(run):
        assert signal.getsignal(number) != before[number]
        os.kill(os.getpid(), number)
        assert run.interrupted
        assert not run.stop  # the step is finished first
        assert {each: signal.getsignal(each) for each in before} == before
    assert "once more stops at once" in capsys.readouterr().err


def test_without_a_signal_all_is_as_before(tmp_path):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run = Run(None, None, None, None, tmp_path, 3)  # type: ignore[arg-type]
    with stopping_softly(run):
        pass
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert not run.interrupted


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_what_machines_send_asks_too_and_may_come_again(tmp_path, number):
    run = Run(None, None, None, None, tmp_path, 3)  # type: ignore[arg-type]
    with stopping_softly(run):
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert run.interrupted
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a person's next one stops at once
    assert signal.getsignal(number) == signal.SIG_DFL
    with saving(run):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_the_answer_to_a_closing_terminal_needs_no_terminal(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = write

    monkeypatch.setattr("sys.stderr", Gone())
    run = Run(None, None, None, None, tmp_path, 3)  # type: ignore[arg-type]
    with stopping_softly(run):
        os.kill(os.getpid(), signal.SIGHUP)
    assert run.interrupted


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_what_is_ignored_stays_ignored(tmp_path, number):
    """As under nohup, and as a shell does with Ctrl-C for what runs in its background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        run = Run(None, None, None, None, tmp_path, 3)  # type: ignore[arg-type]
        with stopping_softly(run):
            os.kill(os.getpid(), number)
            assert not run.interrupted
    finally:
        signal.signal(number, before)


def test_another_programs_handler_stays(tmp_path):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        run = Run(None, None, None, None, tmp_path, 3)  # type: ignore[arg-type]
        with stopping_softly(run):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (got, run.interrupted) == ([1], False)
    finally:
        signal.signal(signal.SIGUSR1, before)
