"""`lowrank check` finds what would stop a run, before the run does, and says what the run will take."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import lowrank
from lowrank.cli import main
from lowrank.errors import InputError
from lowrank.recipes.check import check

MIB = 2**20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.parameter_groups=[{pattern: nowhere, learning_rate: 1e-3}]", "nowhere"),
        ("training.report_to=[wandb]", "wandb is not installed"),
        ("adapter.method=adalora", r"leave none of \d+ steps to shrink ranks"),
        ("data.eval=text.jsonl", "the answer of example 1 is not JSON"),
        ("data.train=nowhere.jsonl", "there is no such file"),
    ],
)
def test_what_would_stop_the_run_is_found(write_config, tmp_path, override, message):
    path = write_config(training={"predict_with_generate": True, "exact_match": "json"})
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": " there"}) + "\n")
    if "adalora" in override:
        text = path.read_text().replace("adapter:\n", "adapter:\n  method: adalora\n  init_r: 6\n  target_r: 4\n")
        path.write_text(text.replace("  lora_alpha: 8\n  r: 4\n", "  lora_alpha: 8\n  tinit: 500\n  tfinal: 500\n"))
        override = "training.num_train_epochs=1"
    with pytest.raises(InputError, match=message):
        check(path, [override])


def test_a_disk_that_is_too_small_for_the_checkpoints(write_config, monkeypatch):
    path = write_config(adapter={"r": 64})
    usage = shutil.disk_usage(path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=65 * MIB + 2**19))
    check(path, ["training.save_minutes=null"])
    with pytest.raises(InputError, match=r"has 66 MiB free, and the run writes about \d+ MiB"):
        check(path)


def test_its_disk_space_is_what_a_run_takes(write_config, tmp_path, capsys):
    path = write_config(adapter={"r": 64}, training={"save_steps": 1, "save_total_limit": 2, "save_minutes": None})
    check(path)
    told = next(line for line in capsys.readouterr().out.splitlines() if "checkpoints" in line)
    lowrank.train(path)
    files = [file for file in (tmp_path / "out").rglob("*.safetensors") if file.is_file()]
    most = sum(file.stat().st_size for file in files)
    one = sum(file.stat().st_size for file in files if "step-" in str(file)) / 2
    assert int(told.split("up to ")[1].split(" MiB")[0]) == pytest.approx((most + one) / MIB, rel=0.1, abs=0.6)


def test_what_does_not_fit_into_memory_is_the_configs_fault(write_config, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = write_config()
    monkeypatch.setattr("lowrank.recipes.check.estimate_memory", full)
    with pytest.raises(SystemExit) as exit:
        main(["check", str(path)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "out of memory while trying the longest batch" in error
    assert "training.tokens_per_batch below 128" in error


def test_the_command_answers_with_0_where_the_run_can_start(write_config, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", str(write_config())])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "the run can start" in out
    assert re.search(r"memory +about [\d,]+ MiB", out)


def test_a_run_of_several_processes_is_checked_in_one(write_config, capsys):
    path = write_config(training={"num_processes": 2, "fsdp": True, "gradient_accumulation_steps": 2})
    check(path)
    assert "4 in a step" in capsys.readouterr().out


def test_a_stream_is_checked_by_its_first_rows(write_config, tmp_path, capsys):
    path = write_config(data={"streaming": True}, training={"max_steps": 5})
    row = (tmp_path / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 500 + "{broken\n")
    check(path)
    assert "streamed from train.jsonl" in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 499 + "{broken\n")
    with pytest.raises(InputError, match=r"train.jsonl:500: the line is not valid JSON"):
        check(path)
