"""A merge on disk beside a plain copy of the same files: time, and peak memory.

    python benchmarks/merge.py                            # 4 GiB in shards of 1 GiB
    python benchmarks/merge.py --gib 16 --folder /mnt/big

A checkpoint of random weights and an adapter of rank 16 on all linear layers are made in a temporary folder. Copies,
merges, and merges that try nothing (`verify=False`) take turns, each merge in a process of its own; all have their
bytes on the disk when the clock stops. Memory is the peak above an interpreter that has loaded torch and transformers.
Writes benchmarks/results/merge-cpu.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from lowrank.storage.tensorfile import encode_header

RESULTS = Path(__file__).parent / "results"
MEBIBYTE = 2**20
SPEED = 0.6  # of a copy's, at least
PROOF = 1.25  # times what a merge takes that tries nothing, at most
ROOM = 150  # MiB above the interpreter, and twice the largest tensor, at most

MERGE = """
import json, sys, time
import torch, transformers  # what any program that merges has loaded
from meter import status_bytes
from lowrank.weights import merge_checkpoint
before, began = status_bytes("VmHWM"), time.process_time()
report = merge_checkpoint(*sys.argv[1:4], verify=sys.argv[4] == "True")
found = {"seconds": report.seconds, "processor": time.process_time() - began, "lost": report.rounding_loss}
print(json.dumps({**found, "extra": status_bytes("VmHWM") - before}))
"""


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = measure(Path(name), options)
    if options.json:
        print(json.dumps(found))
        return
    text = _table(found)
    print(text)
    (RESULTS / "merge-cpu.md").write_text(text, encoding="utf-8")
    (RESULTS / "merge-cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard", type=float, default=1.0, help="GiB of a file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoint and its copies go")
    parser.add_argument("--json", action="store_true", help="print the numbers, and keep none")
    return parser.parse_args()


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Seconds of each copy and merge, bytes of memory, and what of the adapter's effect was lost to rounding."""
    base, adapter, largest = make_checkpoint(folder, options)
    os.sync()  # or the base would go to the disk while the first sides are timed
    size = sum(file.stat().st_size for file in base.iterdir())
    copies, merges, untried = [], [], []
    for repeat in range(options.repeats):
        sides = [
            lambda: copies.append(copied(base, folder / "copy")),
            lambda: merges.append(merged(base, adapter)),
            lambda: untried.append(merged(base, adapter, verify=False)),
        ]
        for side in sides if repeat % 2 == 0 else sides[::-1]:
            side()
    return {"bytes": size, "largest": largest, "copies": copies, "merges": merges, "untried": untried}


def merged(base: Path, adapter: Path, verify: bool = True) -> dict[str, float]:
    """One merge, in a process of its own; what it writes is deleted."""
    out = base.parent / "merged"
    command = [sys.executable, "-c", MERGE, str(base), str(adapter), str(out), str(verify)]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=paths)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def copied(source: Path, target: Path) -> float:
    """Seconds to copy the files and have them on the disk, as a merge does."""
    began = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def make_checkpoint(folder: Path, options: argparse.Namespace) -> tuple[Path, Path, int]:
    """A base of random bfloat16 weights, written from one small pool; an adapter; bytes of the largest tensor."""
    base = folder / "base"
    config = _config(options)
    config.save_pretrained(base)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sizes = {name: tensor.numel() * 2 for name, tensor in state.items()}
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    files = _in_files(sizes, options.shard * 2**30)
    for file, names in files.items():
        header, _ = encode_header([(name, "BF16", shapes[name]) for name in names], {"format": "pt"})
        with (base / file).open("wb") as stream:
            stream.write(header)
            for name in names:
                for start in range(0, sizes[name] // 2, len(pool)):
                    stream.write(pool[: sizes[name] // 2 - start].view(torch.uint8).numpy().data)
    weight_map = {name: file for file, names in files.items() for name in names}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_adapter(folder / "adapter", {name: shape for name, shape in shapes.items() if name.endswith("proj.weight")})
    return base, folder / "adapter", max(sizes.values())


def _config(options: argparse.Namespace) -> transformers.LlamaConfig:
    """A Llama of the asked size, its depth chosen so."""
    hidden, wide = options.hidden, 8 * options.hidden // 3
    layer = 4 * hidden * hidden + 3 * hidden * wide
    layers = round((options.gib * 2**29 - 2 * options.vocabulary * hidden) / layer) + 1
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=options.vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _in_files(sizes: dict[str, int], most: float) -> dict[str, list[str]]:
    """Names of tensors by file, in order, each file as full as it gets."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > most:
            shards.append([])
        shards[-1].append(name)
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Rank 16 on every matrix, as peft writes it."""
    folder.mkdir()
    tensors = {}
    for name, (out, into) in shapes.items():
        path = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{path}.lora_A.weight"] = torch.randn(16, into) * 0.02
        tensors[f"{path}.lora_B.weight"] = torch.randn(out, 16) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ends = sorted({name.split(".")[-2] for name in shapes})
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ends, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _all(merges: list[dict[str, float]], what: str) -> list[float]:
    return [merge[what] for merge in merges]


def _median(merges: list[dict[str, float]], what: str) -> float:
    return statistics.median(_all(merges, what))


def _table(found: dict) -> str:
    copies, merges, untried = found["copies"], found["merges"], found["untried"]
    rows = {"copy": copies}
    rows |= {"merge, each tensor tried": _all(merges, "seconds"), "merge, nothing tried": _all(untried, "seconds")}
    speed = statistics.median(copies) / statistics.median(rows["merge, each tensor tried"])
    wall, processor = (_median(merges, what) / _median(untried, what) for what in ("seconds", "processor"))
    extra = max(merge["extra"] for merge in found["merges"]) / MEBIBYTE
    most = ROOM + 2 * found["largest"] / MEBIBYTE
    lines = [
        f"# A merge of {found['bytes'] / 2**30:.2f} GiB beside a copy of its files",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, transformers "
        f"{transformers.__version__}. `python {' '.join(sys.argv)}`: {len(copies)} of each, in turns.",
        "",
        "| | median s | lowest | highest |",
        "|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(taken):.1f} | {min(taken):.1f} | {max(taken):.1f} |"
            for name, taken in rows.items()
        ),
        "",
        f"- speed: {speed:.0%} of a copy's, at least {SPEED:.0%}: {'kept' if speed >= SPEED else 'MISSED'}",
        f"- trying each tensor: {wall:.2f} times the time of a merge that tries nothing, {processor:.2f} times its "
        f"processor time; at most {PROOF}: {'kept' if wall <= PROOF else 'MISSED'}",
        f"- memory above the interpreter: {extra:.0f} MiB, at most {most:.0f} (largest tensor "
        f"{found['largest'] / MEBIBYTE:.0f}): {'kept' if extra <= most else 'MISSED'}",
        f"- rounding to bfloat16 loses {found['merges'][0]['lost']:.1%} of the adapter's effect",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
