"""A merge's memory and speed, measured on a checkpoint much larger than what it may use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from lowrank.weights.tensorfile import encode_header

MEASURE = """
import json, sys
import torch, transformers  # what any program that merges has loaded
from lowrank.weights import merge_checkpoint
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
report = merge_checkpoint(*sys.argv[1:])
print(json.dumps({"before": before, "peak": peak(), "seconds": report.seconds, "loss": report.rounding_loss}))
"""


def make_checkpoint(folder: Path, config: transformers.PretrainedConfig, shard: int) -> tuple[Path, Path, int]:
    """Random bf16 weights in shards, written from one small pool; an all-linear adapter of rank 16; the largest tensor."""
    base, adapter = folder / "base", folder / "adapter"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[list[str]] = [[]]
    for name, tensor in state.items():
        if sum(state[other].numel() * 2 for other in shards[-1]) + tensor.numel() * 2 > shard and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        header, _ = encode_header([(name, "BF16", tuple(state[name].shape)) for name in names], {"format": "pt"})
        with (base / file_name).open("wb") as file:
            file.write(header)
            for name in names:
                for start in range(0, state[name].numel(), len(pool)):
                    piece = pool[: min(len(pool), state[name].numel() - start)]
                    file.write(piece.view(torch.uint8).numpy().data)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_adapter_files(adapter, {name: t.shape for name, t in state.items() if name.endswith("proj.weight")})
    return base, adapter, max(tensor.numel() * 2 for tensor in state.values())


def write_adapter_files(folder: Path, shapes: dict[str, torch.Size]) -> None:
    folder.mkdir()
    tensors = {}
    for name, (out, into) in shapes.items():
        path = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{path}.lora_A.weight"] = torch.randn(16, into) * 0.02
        tensors[f"{path}.lora_B.weight"] = torch.randn(out, 16) * 0.02
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ends = sorted({name.split(".")[-2] for name in shapes})
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ends, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(*arguments: Path) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def copied(source: Path, target: Path) -> float:
    """Seconds to copy the files and have them on the disk, as a merge does."""
    started = time.monotonic()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        fd = os.open(target / file.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """420 MiB of weights, 16 MiB the largest tensor."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8, vocab_size=8000
    )
    base, adapter, largest = make_checkpoint(tmp_path, config, shard=100 * 2**20)
    figures = measured(base, adapter, tmp_path / "merged")
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "merged")
    assert figures["peak"] - figures["before"] <= 150 * 2**20 + 2 * largest
    assert figures["loss"] > 0


@pytest.mark.slow
def test_four_gibibytes(tmp_path: Path) -> None:
    """Memory at most 150 MiB over the interpreter plus twice the largest tensor; at least 60 % of the speed of a copy."""
    config = transformers.LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=20, num_attention_heads=24, vocab_size=32000
    )
    base, adapter, largest = make_checkpoint(tmp_path, config, shard=1 << 30)
    size = sum(file.stat().st_size for file in base.iterdir())
    assert size > 4 * 2**30
    copies, merges = [], []
    for _ in range(3):
        copies.append(copied(base, tmp_path / "copy"))
        figures = measured(base, adapter, tmp_path / "merged")
        merges.append(figures["seconds"])
        shutil.rmtree(tmp_path / "merged")
        assert figures["peak"] - figures["before"] <= 150 * 2**20 + 2 * largest
    print(f"{size / 2**30:.2f} GiB: copied in {min(copies):.1f} s, merged in {min(merges):.1f} s, {figures}")
    shutil.rmtree(base)
    assert min(copies) / min(merges) >= 0.6
