"""Two processes train the same adapter as one, replicated and sharded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from markupsafe import escape
from processes import start, start_ranks
from safetensors.torch import load_file

import lowrank
from lowrank.errors import InputError
from lowrank.training.machine.ranks import Ranks, share

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def run_config(write_config):
    return write_config(data={"max_length": 64}, training={"num_train_epochs": 2, "learning_rate": 1e-3})


def train_together(tmp_path, config, *overrides: str, count: int = 2, resume: bool = False) -> str:
    options = [part for override in overrides for part in ("--set", override)]
    processes = start_ranks(tmp_path, ["train", str(config), *options, *(["--resume"] if resume else [])], count)
    for process in processes:
        process.join(200)
    output = (tmp_path / "out.txt").read_text()
    assert [process.exitcode for process in processes] == [0] * count, output
    return output


def assert_close(found, expected, tolerance: float = 1e-6) -> None:
    first, second = (load_file(folder / ADAPTER) for folder in (found, expected))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_adapter_as_one_process(run_config, tmp_path, fsdp, accumulation):
    alone = lowrank.train(
        run_config, ["training.output_dir=alone", f"training.gradient_accumulation_steps={2 * accumulation}"]
    )
    shared = f"training.gradient_accumulation_steps={accumulation}"
    output = train_together(tmp_path, run_config, shared, f"training.fsdp={str(fsdp).lower()}")
    assert alone.steps >= 6
    assert_close(tmp_path / "out", alone.output_dir)
    assert output.count("this run") == 1  # one process prints
    assert f"{alone.after.loss:.4f}" in output


@pytest.mark.parametrize("fsdp", [False, True])
def test_answers_are_those_of_one_process(run_config, tmp_path, fsdp):
    """Five rows, so that the processes' shares differ."""
    answering = ["training.predict_with_generate=true", "training.generation_max_new_tokens=4", "data.max_eval_rows=5"]
    alone = lowrank.train(
        run_config, [*answering, "training.output_dir=alone", "training.gradient_accumulation_steps=2"]
    )
    train_together(tmp_path, run_config, *answering, f"training.fsdp={str(fsdp).lower()}")
    told = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert told["eval_exact_match"] == alone.before.exact_match
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(alone.after.samples) == 5
    for sample in alone.after.samples[:3]:
        assert escape(sample.answer) in page


@pytest.mark.parametrize("method", ["dora", "adalora"])
def test_other_methods_sharded(run_config, tmp_path, method):
    text = run_config.read_text()
    adapter = {"dora": "adapter: {method: dora, r: 4}", "adalora": "adapter: {method: adalora, init_r: 4, target_r: 2}"}
    run_config.write_text(text.replace("adapter:\n  lora_alpha: 8\n  r: 4\n", adapter[method] + "\n"))
    alone = lowrank.train(run_config, ["training.output_dir=alone", "training.gradient_accumulation_steps=2"])
    train_together(tmp_path, run_config, "training.fsdp=true")
    assert_close(tmp_path / "out", alone.output_dir)


def test_a_quantised_base_sharded(run_config, tmp_path):
    four_bits = [
        "model.dtype=float32",
        "quantization.load_in_4bit=true",
        "quantization.bnb_4bit_compute_dtype=float32",
        "quantization.bnb_4bit_quant_storage=float32",
    ]
    alone = lowrank.train(
        run_config, [*four_bits, "training.output_dir=alone", "training.gradient_accumulation_steps=2"]
    )
    train_together(tmp_path, run_config, *four_bits, "training.fsdp=true")
    assert_close(tmp_path / "out", alone.output_dir, 1e-5)


CONSTANT = ["training.lr_scheduler_type=constant", "training.warmup_ratio=0", "training.warmup_steps=1"]


@pytest.mark.parametrize("first", [1, 2])
def test_saved_by_so_many_resumed_by_others(run_config, tmp_path, first):
    def accumulated(count: int) -> str:
        return f"training.gradient_accumulation_steps={2 // count}"

    whole = [*CONSTANT, "training.max_steps=6", "training.output_dir=straight"]
    straight = lowrank.train(run_config, [*whole, accumulated(1)])
    second = 3 - first
    train_together(tmp_path, run_config, *CONSTANT, "training.max_steps=3", accumulated(first), count=first)
    longer = [*CONSTANT, "training.max_steps=6", accumulated(second)]
    train_together(tmp_path, run_config, *longer, count=second, resume=True)
    assert_close(tmp_path / "out", straight.output_dir)
    with pytest.raises(InputError, match="a step of the run had 2 batches, and now it would have 1"):
        lowrank.train(run_config, [*CONSTANT, "training.max_steps=6"], resume=True)


def test_a_signal_to_one_of_them_stops_all(run_config, tmp_path):
    processes = start_ranks(tmp_path, ["train", str(run_config), "--set", "training.num_train_epochs=4000"], 2)
    wait_for_text(tmp_path / "out.txt", "step 2/")
    os.kill(processes[1].pid, signal.SIGINT)
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    assert "To go on: lowrank train out --resume" in (tmp_path / "out.txt").read_text()


def wait_for_text(file, text: str, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.05)


def test_another_number_of_processes_than_asked_for_is_refused(run_config, tmp_path):
    process = start(tmp_path, ["train", str(run_config), "--set", "training.num_processes=2"])
    process.join(100)
    assert process.exitcode == 2
    assert "asks for 2 processes, and 1 joined the run" in (tmp_path / "out.txt").read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_through_torchrun(run_config, tmp_path):
    alone = lowrank.train(run_config, ["training.output_dir=alone", "training.gradient_accumulation_steps=2"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    subprocess.run([*launch, "-m", "lowrank", "train", str(run_config)], check=True, cwd=tmp_path)
    assert_close(tmp_path / "out", alone.output_dir)


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_process_for_two_is_refused(run_config, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    command = ["-m", "lowrank", "train", str(run_config)]
    refused = subprocess.run([*launch, "2", *command], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "asked for several processes and has started one by itself" in refused.stderr
    assert not (tmp_path / "out").exists()
    subprocess.run([*launch, "1", *command, "--set", "training.max_steps=1"], cwd=tmp_path, check=True)
    assert (tmp_path / "out" / ADAPTER).exists()


def test_batches_are_balanced_by_tokens():
    sizes = [10, 90, 80, 20, 50, 45]
    shares = [share(sizes, Ranks(index, 2)) for index in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert abs(sum(sizes[at] for at in shares[0]) - sum(sizes[at] for at in shares[1])) <= 15
    assert [len(part) for part in shares] == [3, 3]
    assert [share([5], Ranks(index, 3)) for index in range(3)] == [[0], [], []]
