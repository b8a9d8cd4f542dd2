"""Signals: the first one asks, the second one is the interpreter's own."""

from __future__ import annotations

import os
import signal

import pytest

from lowrank.training.callbacks import Run
from lowrank.training.interrupt import stopping_softly


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
