"""Memory and time of a training step of one long sequence: attention, gradient checkpointing, chunked loss together.

    python benchmarks/long_context.py --lengths 4096 8192 16384 --hidden 256 --layers 8 --vocabulary 49152

Each length runs in a process of its own; what is counted is the peak of the process less what it held before the step.
Prints a table with the fitted exponent of growth, and writes benchmarks/results/long-context-cpu.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

import lowrank
from lowrank.attention import set_attention
from lowrank.data import Example, Examples, plan_batches
from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.loop import fit
from lowrank.training.loss import supervised_loss
from lowrank.training.optim import Settings, build_optimizer
from lowrank.training.recompute import recompute_activations
from lowrank.training.schedule import build_schedule

RESULTS = Path(__file__).parent / "results"


class Watch(Callback):
    def on_run_start(self, run: Run) -> None:
        self.before, self.began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        self.loss = metrics.loss


def one_step(options: argparse.Namespace, length: int) -> dict[str, float]:
    """A step at one length, in this process."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=length,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lowrank.wrap(model, lowrank.LoraConfig(r=8))
    set_attention(model, options.backend, packing=True)
    recompute_activations(model, True)
    ids = torch.randint(3, options.vocabulary, (length,)).tolist()
    examples = Examples.of([Example(ids, [False] + [True] * (length - 1))], "all")
    plan = plan_batches(examples, packing=True, batch_size=1, max_tokens=length, pad_token_id=0, seed=0)
    optimizer = build_optimizer(model, Settings(1e-4))
    watch = Watch()
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, total_steps=1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = Run(model, optimizer, schedule, scaler, Path(), 1, callbacks=[watch])
    loss = supervised_loss(model)
    with run.underway():
        fit(run, plan, loss, accelerator=Accelerator(cpu=True))
    seconds = time.perf_counter() - watch.began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - watch.before
    return {"length": length, "peak_mib": peak / 1024, "seconds": seconds, "loss": watch.loss}


def exponent(results: list[dict[str, float]], key: str) -> float:
    """Slope of the line through the logarithms."""
    x = [math.log(result["length"]) for result in results]
    y = [math.log(result[key]) for result in results]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--backend", default="segments")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_step(options, options.one)))
        return
    results = []
    for length in options.lengths:
        command = [sys.executable, *sys.argv, "--one", str(length)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    lines = ["| tokens | peak MiB over the model | seconds |", "|---|---|---|"]
    lines += [f"| {r['length']:,} | {r['peak_mib']:,.0f} | {r['seconds']:.1f} |" for r in results]
    head = (
        f"# One long sequence: Llama of {options.layers} layers, hidden size {options.hidden}, vocabulary "
        f"{options.vocabulary:,}, bfloat16, LoRA r = 8, {options.backend}\n\n{platform.machine()}, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}. "
        f"`python {' '.join(sys.argv)}`. One step each, gradient checkpointing and chunked loss on.\n"
    )
    tail = f"\nMemory grows with the {exponent(results, 'peak_mib'):.2f}th power of the length.\n"
    text = "\n".join([head, *lines, tail])
    print(text)
    (RESULTS / "long-context-cpu.md").write_text(text, encoding="utf-8")
    (RESULTS / "long-context-cpu.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
