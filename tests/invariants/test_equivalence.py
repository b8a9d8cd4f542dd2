"""What must not change a run's result does not: the same training by other means gives the same adapter.

All rows are in every step, so the means differ in how a step is computed and in nothing else. Where the arithmetic is the
same the files are equal; elsewhere sums of float32 are taken in another order, and Adam divides small numbers by small
numbers: no weight may be off by more than `LARGEST`, and all together by no more than `DRIFT` on average. The loss of
every step is the same to `LOSS`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from processes import start, start_ranks
from safetensors.torch import load_file
from short_run import chats

from lowrank.cli import main

ROWS = 8  # as many as a batch holds by default
LARGEST, DRIFT, LOSS = 2e-5, 1e-6, 1e-5
ADAPTER = "adapter_model.safetensors"

PADDED = ["data.packing=false"]
WAYS = {
    "eight single rows": [*PADDED, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"],
    "two batches of four": [*PADDED, "training.per_device_train_batch_size=4", "training.tokens_per_step=100000"],
    "gradient checkpointing": [*PADDED, "training.gradient_checkpointing=true"],
    "offloaded layers": [*PADDED, "training.offload=layers"],
    "one pack": ["training.tokens_per_batch=100000"],
    "several packs": ["data.max_length=64", "training.tokens_per_batch=80", "training.tokens_per_step=100000"],
    "eager attention": [*PADDED, "model.attention=eager"],
    "sdpa": [*PADDED, "model.attention=sdpa"],
}


@pytest.fixture
def config(write_config, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(ROWS)))
    return write_config(training={"num_train_epochs": 6, "learning_rate": 1e-3})


def command(config, *overrides: str, output: str) -> list[str]:
    settings = [part for override in (*overrides, f"training.output_dir={output}") for part in ("--set", override)]
    return ["train", str(config), *settings]


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert not exited.value.code


def in_one_batch(config, tmp_path) -> dict[str, torch.Tensor]:
    run(command(config, *PADDED, output="batch"))
    return load_file(tmp_path / "batch" / ADAPTER)


def losses_in(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    losses = losses_in(folder.parent / "batch")
    assert len(losses) == 6
    assert losses_in(folder) == pytest.approx(losses, abs=LOSS)
    found = load_file(folder / ADAPTER)
    off = torch.cat([(found[name] - tensor).flatten() for name, tensor in expected.items()])
    assert off.abs().max() <= LARGEST
    assert off.mean().abs() <= DRIFT


@pytest.mark.parametrize("way", WAYS)
def test_the_same_step_by_other_means(config, tmp_path, way):
    expected = in_one_batch(config, tmp_path)
    run(command(config, *WAYS[way], output="other"))
    assert_same(tmp_path / "other", expected)


@pytest.mark.parametrize("away", ["fsdp=false", "fsdp=true", "offload=layers"])
def test_two_processes(config, tmp_path, away):
    expected = in_one_batch(config, tmp_path)
    halves = ["training.per_device_train_batch_size=4", f"training.{away}"]
    processes = start_ranks(tmp_path, command(config, *PADDED, *halves, output="two"), 2)
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "out.txt").read_text()
    assert_same(tmp_path / "two", expected)


def test_resumed_half_way_is_the_same_file(config, tmp_path):
    in_one_batch(config, tmp_path)
    halves = command(config, *PADDED, "training.save_steps=3", output="resumed")
    killed = start(tmp_path, halves, dies=("step", 4))
    killed.join(100)
    assert killed.exitcode < 0
    run([*halves, "--resume"])
    assert (tmp_path / "resumed" / ADAPTER).read_bytes() == (tmp_path / "batch" / ADAPTER).read_bytes()


class TestSharedBeginnings:
    """Rows behind one long system prompt: computed once, they train as apart."""

    SHARED = ("data.share_prefixes=true", "data.max_length=256", "training.tokens_per_batch=100000")
    SEVERAL = ("data.share_prefixes=true", "data.max_length=256", "training.tokens_per_batch=256")
    APART = ("data.share_prefixes=false", "data.max_length=256", "training.tokens_per_batch=100000")
    WHOLE = ("training.tokens_per_step=100000",)

    @pytest.fixture
    def config(self, config, tmp_path):
        system = {"role": "system", "content": " ".join(f"rule {n}: say {n}." for n in range(8))}
        rows = [{"messages": [system, *row["messages"]]} for row in chats(ROWS)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return config

    @pytest.fixture
    def expected(self, config, tmp_path):
        run(command(config, *self.APART, output="batch"))
        return load_file(tmp_path / "batch" / ADAPTER)

    @pytest.mark.parametrize("way", ["SHARED", "SEVERAL"])
    def test_shared_is_apart(self, config, tmp_path, expected, way, capsys):
        run(command(config, *getattr(self, way), *self.WHOLE, output="other"))
        assert re.search(r"tokens as [\d,]+; \d\.\d\d times", capsys.readouterr().out)
        assert_same(tmp_path / "other", expected)

    def test_two_processes(self, config, tmp_path, expected):
        processes = start_ranks(tmp_path, command(config, *self.SEVERAL, *self.WHOLE, output="two"), 2)
        for process in processes:
            process.join(200)
        assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "out.txt").read_text()
        assert_same(tmp_path / "two", expected)

    def test_resumed_half_way_is_the_same_file(self, config, tmp_path):
        steps = command(config, *self.SEVERAL, "training.save_steps=3", output="resumed")
        run(command(config, *self.SEVERAL, output="whole"))
        killed = start(tmp_path, steps, dies=("step", 4))
        killed.join(100)
        assert killed.exitcode < 0
        run([*steps, "--resume"])
        assert (tmp_path / "resumed" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_the_same_run_twice_is_the_same_file(config, tmp_path):
    in_one_batch(config, tmp_path)
    run(command(config, *PADDED, output="again"))
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (tmp_path / "batch" / ADAPTER).read_bytes()
