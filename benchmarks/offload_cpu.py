"""A Llama of a billion random parameters, trained on the CPU with its layers in the model's file and without.

    python benchmarks/offload_cpu.py --layers 16 --steps 3

Each run is a process of its own, of which are told the most memory that it held (VmHWM, file pages among it), the most
that was its own, the most that was files', and the tokens it trained on a second. Both ways recompute activations.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

ROWS = 12
PACK = 256
TOKENIZER = Path(__file__).parents[1] / ".cache" / "models" / "smollm2-135m-instruct"


def make_base(folder: Path, layers: int) -> int:
    """A random Llama in bfloat16, with SmolLM2's tokenizer; how many parameters it has."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_config(folder: Path, base: Path, steps: int, offload: str) -> Path:
    """Rows of plain text, LoRA on every linear layer."""
    rows = [{"text": " ".join(f"line {i} of row {row}" for i in range(24))} for row in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name_or_path": str(base), "device": "cpu", "compute_dtype": "bfloat16"},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {"train": str(folder / "train.jsonl"), "max_length": PACK},
        "training": {
            "output_dir": str(folder / f"out-{offload}"),
            "max_steps": steps,
            "gradient_checkpointing": True,
            "offload": offload,
            "report_to": "none",
            "save_minutes": None,
        },
    }
    path = folder / f"{offload}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path) -> dict[str, float]:
    """MiB at the peak (all, own, of files) and tokens a second of `lowrank train`."""
    command = [sys.executable, "-m", "lowrank", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for name in peaks:
                if found := re.search(rf"{name}:\s+(\d+)", text):
                    peaks[name] = max(peaks[name], int(found[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    over.set()
    watcher.join()
    assert process.returncode == 0, errors
    output = Path(yaml.safe_load(config.read_text())["training"]["output_dir"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    speed = statistics.median(line["tokens_per_second"] for line in steps[1:])
    return {**{name: peak / 1024 for name, peak in peaks.items()}, "tokens/s": speed, "loss": steps[-1]["loss"]}


def main() -> None:
    """Both ways, and a table of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_base(folder / "base", given.layers)
        print(f"{parameters / 1e6:,.0f} M parameters, {given.layers} layers; {platform.platform()}, torch", end=" ")
        print(f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
        print("| offload | peak MiB | own | of files | tokens/s | last loss |\n|---|---|---|---|---|---|")
        for offload in ("none", "layers"):
            found = run(make_config(folder, folder / "base", given.steps, offload))
            figures = f"{found['VmHWM']:,.0f} | {found['RssAnon']:,.0f} | {found['RssFile']:,.0f}"
            print(f"| {offload} | {figures} | {found['tokens/s']:.1f} | {found['loss']!r} |", flush=True)


if __name__ == "__main__":
    main()
