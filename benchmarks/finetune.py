"""The same LoRA fine-tune by lowrank and by what people use today, in alternating order, each in its own process.

    python benchmarks/finetune.py .cache/models/smollm2-135m-instruct --method lora --dtype bfloat16 --repeats 5

Same weights, rows, rank, targets, dtype and (on average) tokens in a step. Reported are real tokens a second (without
padding), peak memory, the time to the first step, medians and spread, the ratio to peft + Trainer, and the share of the
machine's own matrix-product rate: the floating-point operations that a LoRA step needs, divided by the time and by the
rate of plain products of the model's shapes, measured in the same run. Writes JSON, a table and a plot to
benchmarks/results/finetune-<device>-<method>-<dtype>.*
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "contestants"))
from job import Job  # noqa: E402

CONTESTANTS = {"lowrank": "lowrank_run.py", "peft + Trainer": "peft_trainer.py", "TRL SFT + packing": "trl_sft.py"}
BARS = {  # tokens a second and peak memory against peft + Trainer
    ("lora", "bfloat16"): (6.0, 0.33),
    ("lora", "float32"): (3.5, 0.40),
    ("dora", "bfloat16"): (6.0, 0.30),
    ("qlora", "bfloat16"): (4.0, 0.40),
}


def run(contestant: str, job: Job) -> dict | None:
    """One process; None where it failed, with its last words shown."""
    command = [sys.executable, str(HERE / "contestants" / CONTESTANTS[contestant]), json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{contestant} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def product_rate(dtype: torch.dtype, rows: int = 1024, width: int = 576, wide: int = 1536) -> float:
    """Floating-point operations a second of plain products of SmolLM2's shapes."""
    x, w = torch.randn(rows, width).to(dtype), torch.randn(wide, width).to(dtype)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - began)
    return 10 * 2 * rows * width * wide / statistics.median(times)


def operations_a_token(folder: str, supervised: float) -> float:
    """What a LoRA step needs for a token: forward, and backward to the inputs alone, since the base is frozen; the head
    for supervised tokens only. Low-rank products and attention are not counted."""
    config = AutoConfig.from_pretrained(folder)
    head_width = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_width * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return 2 * 2 * (config.num_hidden_layers * layer + supervised * config.hidden_size * config.vocab_size)


def middle(results: list[dict], key: str) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    values = [result[key] for result in results]
    return statistics.median(values), min(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", choices=["lora", "dora", "qlora"], default="lora")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(CONTESTANTS), help="leave the others out")
    options = parser.parse_args()
    names = options.only or list(CONTESTANTS)
    results: dict[str, list[dict]] = {name: [] for name in names}
    rates = []
    for repeat in range(options.repeats):
        rates.append(product_rate(getattr(torch, options.dtype)))
        for name in names if repeat % 2 == 0 else names[::-1]:
            job = Job(options.model, method=options.method, dtype=options.dtype, steps=options.steps, seed=repeat)
            result = run(name, job)
            if result is not None:
                results[name].append(result)
                print(f"{repeat + 1}: {name}: {result['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    write(options, {name: taken for name, taken in results.items() if taken}, statistics.median(rates))


def write(options: argparse.Namespace, results: dict[str, list[dict]], rate: float) -> None:
    """Table on the screen; JSON, table and plot in files."""
    stem = HERE / "results" / f"finetune-cpu-{options.method}-{options.dtype}"
    needed = operations_a_token(options.model, 0.5)
    peft = results.get("peft + Trainer")
    lines = [
        "| | tokens/s (lowest-highest) | against peft | peak MiB | against peft | first step after | of the rate |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, taken in results.items():
        speed, low, high = middle(taken, "tokens_per_second")
        memory = middle(taken, "peak_mib")[0]
        against = [middle(peft, key)[0] for key in ("tokens_per_second", "peak_mib")] if peft else [speed, memory]
        lines.append(
            f"| {name} | {speed:.0f} ({low:.0f}-{high:.0f}) | {speed / against[0]:.2f} | {memory:.0f} | "
            f"{memory / against[1]:.2f} | {middle(taken, 'first_step_after')[0]:.1f} s | {speed * needed / rate:.0%} |"
        )
    bars = BARS.get((options.method, options.dtype))
    libraries = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
    text = [
        f"# {options.method}, {options.dtype}, r = 16, all-linear, SmolLM2-135M, 16 chat-shaped rows a step",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads; "
        + ", ".join(f"{name} {version(name)}" for name in libraries)
        + f". `python {' '.join(sys.argv)}`: {options.repeats} repeats in alternating order, {options.steps - 1} steps "
        f"timed in each. Plain products ran at {rate / 1e9:.0f} GFLOP/s.",
        "",
        *lines,
        "",
        f"Bars against peft + Trainer: at least {bars[0]} times the tokens a second, at most {bars[1]} of the peak "
        "memory."
        if bars
        else "",
    ]
    stem.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({"rate": rate, "results": results}, indent=1), encoding="utf-8")
    plot(results, stem.with_suffix(".png"))
    table = Table(*[part.strip() for part in lines[0].strip("|").split("|")])
    for line in lines[2:]:
        table.add_row(*[part.strip() for part in line.strip("|").split("|")])
    Console(width=150).print(table)


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Tokens a second, a bar each with its spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.add_subplot()
    for name, taken in results.items():
        speed, low, high = middle(taken, "tokens_per_second")
        axes.barh(name, speed, xerr=[[speed - low], [high - speed]], color="#4c8bf5")
    axes.set_xlabel("real tokens a second")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
