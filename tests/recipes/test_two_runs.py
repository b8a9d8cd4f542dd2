"""Two runs and one folder: the second is refused at its start, whatever the first is at; a dead one is in nobody's way."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from processes import start, start_ranks

from lowrank.cli import main

LONG = ["--set", "training.num_train_epochs=4000"]


def wait_for(file, text: str) -> None:
    deadline = time.monotonic() + 100
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.05)


def test_begun_at_the_same_moment(write_config, tmp_path):
    path = write_config(training={"max_steps": 3})
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    absolute = ["train", str(path), "--set", f"training.output_dir={tmp_path / 'out'}"]
    absolute += [part for name in ("train", "eval") for part in ("--set", f"data.{name}={tmp_path / name}.jsonl")]
    processes = [start(folder, absolute) for folder in folders]
    for process in processes:
        process.join(100)
    texts = [(folder / "out.txt").read_text() for folder in folders]
    assert sorted(process.exitcode for process in processes) == [0, 2], texts
    refused = texts[[process.exitcode for process in processes].index(2)]
    assert re.search("a run is at work in|holds a run already", refused)
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_while_it_trains(write_config, tmp_path, capsys, count):
    path = write_config(training={"save_steps": 1})
    arguments = ["train", str(path), *LONG]
    processes = start_ranks(tmp_path, arguments, count) if count > 1 else [start(tmp_path, arguments)]
    try:
        wait_for(tmp_path / "out.txt", "step 2/")
        for verb in (["train", str(path)], ["train", str(path), *LONG, "--resume"]):
            with pytest.raises(SystemExit) as exited:
                main(verb)
            assert exited.value.code == 2
            assert re.search(r"a run is at work in out \(process \d+\)", capsys.readouterr().err)
        for verb in (["merge", "out", "merged"], ["info", "out"], ["export", "out", "served", "--to", "vllm"]):
            with pytest.raises(SystemExit) as exited:
                main(verb)
            told = capsys.readouterr()
            assert exited.value.code in (0, 2)
            assert "did not expect this" not in told.err
            if exited.value.code:
                assert re.search(r"A run is at work in it \(process .*Its checkpoints are in out/checkpoints", told.err)
        os.kill(processes[-1].pid, signal.SIGTERM)
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_killed_run_is_in_nobodys_way(write_config, tmp_path):
    path = write_config(training={"max_steps": 3})
    died = start(tmp_path, ["train", str(path)], dies=("step", 1))
    died.join(100)
    assert died.exitcode == -signal.SIGKILL
    with pytest.raises(SystemExit) as exited:
        main(["train", str(path), "--resume"])
    assert not exited.value.code
    assert not (tmp_path / "out" / ".lock").exists()


def test_what_a_dead_run_locked_on_nfs_is_no_run(write_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    with pytest.raises(SystemExit) as exited:
        main(["train", str(write_config(training={"max_steps": 1}))])
    assert not exited.value.code


def test_a_run_whose_folder_was_moved(write_config, tmp_path, capsys):
    path = write_config(training={"max_steps": 2})
    with pytest.raises(SystemExit):
        main(["train", str(path)])
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as exited:
        main(["train", "moved/config.yaml", "--resume"])
    assert exited.value.code == 2
    assert "if its folder was moved, give that: --set training.output_dir=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exited:
        main(["train", "moved/config.yaml", "--resume", "--set", "training.output_dir=moved"])
    assert not exited.value.code
