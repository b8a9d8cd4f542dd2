"""A run's folder is held by one run; the lock goes with its process, however that ends."""

from __future__ import annotations

import errno
import os
import signal
import time
from multiprocessing.process import BaseProcess

import pytest
from processes import CONTEXT

from lowrank.errors import InputError
from lowrank.storage import lock
from lowrank.storage.lock import held, holder


def hold(folder: str, with_a_child: bool) -> None:
    with held(lock.Path(folder)):
        if with_a_child:
            child = os.fork()
            lock.Path(folder, "child").write_text(str(child or os.getpid()))
        lock.Path(folder, "ready").touch()
        time.sleep(60)


def start_holder(folder, with_a_child: bool) -> BaseProcess:
    process = CONTEXT.Process(target=hold, args=(str(folder), with_a_child))
    process.start()
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_one_at_a_time_also_within_a_process(tmp_path):
    folder = tmp_path / "a" / "b"
    with held(folder):
        assert holder(folder) == f"process {os.getpid()}"
        with pytest.raises(InputError, match=f"a run is at work in .*process {os.getpid()}"), held(folder):
            pass
        assert holder(folder) is not None  # the refusal has not let it go
    assert holder(folder) is None
    assert not (tmp_path / "a").exists()  # nothing was written, nothing is left


def test_what_was_there_or_was_written_stays(tmp_path):
    (tmp_path / "there").mkdir()
    with held(tmp_path / "there"):
        pass
    with held(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "run", "there"]


@pytest.mark.parametrize("with_a_child", [False, True])
def test_a_killed_process_holds_nothing(tmp_path, with_a_child):
    process = start_holder(tmp_path / "run", with_a_child)
    with pytest.raises(InputError, match=f"process {process.pid}"), held(tmp_path / "run"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with held(tmp_path / "run"):  # though a child of it may live on
        assert holder(tmp_path / "run") == f"process {os.getpid()}"
    if with_a_child:
        os.kill(int((tmp_path / "run" / "child").read_text()), signal.SIGKILL)


def test_the_folder_may_vanish_between_opening_and_locking(tmp_path, monkeypatch):
    flock, tries = lock._flock, []

    def late(number, folder):
        if not tries:
            folder.rmdir()  # the run before has ended now
        tries.append(number)
        return flock(number, folder)

    monkeypatch.setattr(lock, "_flock", late)
    with held(tmp_path / "run"):
        assert len(tries) == 2
        assert holder(tmp_path / "run") is not None


def test_where_only_files_can_be_locked(tmp_path, monkeypatch):
    """As on NFS: a folder is never open for writing."""
    flock = lock.fcntl.flock

    def like_nfs(number, how):
        if how & lock.fcntl.LOCK_EX and os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(number, how)

    monkeypatch.setattr(lock.fcntl, "flock", like_nfs)
    with held(tmp_path / "run"):
        assert holder(tmp_path / "run") == f"process {os.getpid()}"
        with pytest.raises(InputError, match="a run is at work in"), held(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    lines = []
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with held(tmp_path / "run", lines.append):
        pass
    assert len(lines) == 1
    assert "cannot be locked (No locks available)" in lines[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "file is no folder"),
        ("file/run", "file is no folder"),
        ("file/run/deeper", "file is no folder"),
        ("/dev/null/run", "/dev/null is no folder"),
        ("/proc/run", "/proc/run cannot be written to: "),
        ("a" * 300, "file name too long"),
        ("a" * 300 + "/run", "file name too long"),
    ],
)
def test_where_no_folder_can_be(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as raised, held(lock.Path(path)):
        pass
    assert message in str(raised.value)
    assert raised.value.where == "training.output_dir"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_disk(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.tempfile, "TemporaryFile", lambda **_: fails())
    with pytest.raises(InputError, match=f"cannot be written to: {os.strerror(number).lower()}"), held(tmp_path / "x"):
        pass
