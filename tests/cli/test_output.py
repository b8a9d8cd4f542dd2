"""No output is too narrow, closed, full or gone for a job to end well, and an error to be told."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from lowrank.cli.failure import told
from lowrank.recipes.parts.show import open_console
from lowrank.recipes.parts.streams import Unfailing, unfailing_output

LOWRANK = [sys.executable, "-m", "lowrank"]


def lowrank(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `shell` follows it, with redirections."""
    words = [*LOWRANK, *arguments]
    command = ["bash", "-c", f'"$@" {shell}', "bash", *words] if shell else words
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_does_not_know_is_an_escape(encoding):
    raw = io.BytesIO()
    stream = Unfailing(io.TextIOWrapper(raw, encoding=encoding))
    text = "‖ΔW‖ é 🙂 \udce9 →\n"
    print(text, file=stream)
    stream.flush()
    written = raw.getvalue().decode(encoding)
    assert "\\udce9" in written
    assert ("é" in written) == (encoding != "ascii")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "x"), OSError(5, "x"), OSError(28, "x"), ValueError("closed")])
def test_a_stream_that_fails_gets_what_it_takes(error, monkeypatch):
    class Failing(io.StringIO):
        def write(self, text):
            raise error

        def flush(self):
            raise error

    monkeypatch.setattr(sys, "stdout", Failing())
    with unfailing_output():
        print("a")
        sys.stdout.writelines(["b"])
        sys.stdout.flush()
        open_console().print("[bold]c", "d" * 300)
    assert isinstance(sys.stdout, Failing)


def test_a_path_is_no_markup(capsys):
    open_console().print("runs/[bold]x[/] [/y] :smile:")
    assert capsys.readouterr().out == "runs/[bold]x[/] [/y] :smile:\n"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252", "TERM": "dumb", "NO_COLOR": "1"},
        {"PYTHONIOENCODING": "ascii:strict", "FORCE_COLOR": "1", "COLUMNS": "1"},
        {"LC_ALL": "C"},
    ],
    ids=str,
)
def test_help_and_errors_in_any_encoding(environment, tmp_path):
    assert lowrank("--help", **environment).returncode == 0
    refused = lowrank("train", f"{tmp_path}/日本 é.yaml", **environment)
    assert refused.returncode == 2
    assert "there is no such file" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_where_files_have_names_of_ascii_alone(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = lowrank("train", f"{tmp_path}/é.yaml", **environment)
    assert (told.returncode, "Traceback" in told.stderr, "did not expect" in told.stderr) == (2, False, False)


@pytest.mark.parametrize("shell", [">&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>&1", "| true"])
def test_output_that_is_closed_full_or_gone(shell, tmp_path):
    ended = lowrank("train", "--help", shell=f"{shell}; exit ${{PIPESTATUS[0]}}")
    assert ended.returncode == 0, ended.stderr
    assert lowrank("train", f"{tmp_path}/none.yaml", shell=f"{shell}; exit ${{PIPESTATUS[0]}}").returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "error: a/b: no such file or directory\n"),
        (IsADirectoryError(21, "Is a directory", "a"), 2, "error: a: is a directory\n"),
        (PermissionError(13, "Permission denied", b"a"), 2, "error: a: permission denied\n"),
        (OSError(28, "No space left on device", "a"), 1, "error: a: no space left on device\n"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_as_that(error, code, message, capsys):
    assert told(error) == code
    assert capsys.readouterr().err == message


def test_a_traceback_that_no_file_has_room_for_is_shown(monkeypatch, capsys):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda *_, **__: os.mkdir("/dev/full/none"))
    assert told(RuntimeError("odd")) == 1
    err = capsys.readouterr().err
    assert "lowrank did not expect this; it comes from here:" in err
    assert "RuntimeError: odd" in err
