"""Memory and time of a training step of one long sequence: attention, gradient checkpointing, chunked loss together.

    python benchmarks/long_context.py                 # segments and sdpa, 4,096 ... 16,384 tokens
    python benchmarks/long_context.py --device cuda --lengths 4096 8192 16384 32768
    python benchmarks/long_context.py --base .cache/models/smollm2-135m-instruct --layers 4 --dtype float32 \
        --backends segments --lengths 16384 65536 --output long-context-cpu-smollm2

lowrank's own loop, loss and recomputation train a narrow model of real depth, or a real one cut to few layers. Each
step runs in a process of its own; what is counted is the peak during the step above what the process held before it.
Prints a table with the fitted exponents of growth, and writes benchmarks/results/long-context-<device>.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from meter import exponent, extra_mebibytes, machine
from transformers import PreTrainedModel

import lowrank
from lowrank.data import Example, Examples, plan_batches
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import supervised_loss
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.schedule import build_schedule
from lowrank.training.optimisers.settings import OptimizerSettings
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.transforms.recompute import recompute_activations

RESULTS = Path(__file__).parent / "results"
LINEAR = 1.1  # the highest exponent that counts as linear


class Watch(Callback):
    """Keeps the last step's figures."""

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """See `Callback`."""
        self.loss, self.seconds = metrics.loss, metrics.seconds


def one_step(options: argparse.Namespace, backend: str, length: int) -> dict[str, Any]:
    """A step at one length, in this process, after a short one in which libraries make their plans."""
    device = torch.device(options.device)
    model = _model(options, length)
    torch.nn.Module.to(model, device)
    lowrank.wrap(model, lowrank.LoraConfig(r=8))
    lowrank.set_attention(model, backend, packing=True)
    recompute_activations(model, True)
    watch = Watch()
    _fit(model, 256, options, watch)
    peak = extra_mebibytes(lambda: _fit(model, length, options, watch), device)
    return {"backend": backend, "length": length, "mebibytes": peak, "seconds": watch.seconds, "loss": watch.loss}


def _model(options: argparse.Namespace, length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.base:
        cut = {"num_hidden_layers": options.layers, "max_position_embeddings": length}
        config = transformers.AutoConfig.from_pretrained(options.base, **cut)
        return transformers.AutoModelForCausalLM.from_pretrained(options.base, config=config, dtype=dtype)
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
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _fit(model: PreTrainedModel, length: int, options: argparse.Namespace, watch: Watch) -> None:
    """One optimiser step on one sequence, all of it supervised."""
    ids = torch.randint(3, options.vocabulary, (length,)).tolist()
    examples = Examples.of([Example(ids, [False] + [True] * (length - 1))], "all")
    plan = plan_batches(examples, packing=True, batch_size=1, max_tokens=length, pad_token_id=0, seed=0)
    optimizer = build_optimizer(model, OptimizerSettings(1e-4))
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, total_steps=1)
    scaler = torch.amp.GradScaler(options.device, enabled=False)
    run = Run(model, optimizer, schedule, scaler, Path(), 1, callbacks=[watch])
    with run.underway():
        fit(run, plan, supervised_loss(model), accelerator=Accelerator(cpu=options.device == "cpu"))


def main() -> None:
    options = _options()
    if options.one:
        backend, length = options.one.split(":")
        print(json.dumps(one_step(options, backend, int(length))))
        return
    results = []
    for backend in options.backends:
        for length in options.lengths:
            command = [sys.executable, *sys.argv, "--one", f"{backend}:{length}"]
            began = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(results[-1], f"whole process {time.perf_counter() - began:.0f} s", file=sys.stderr)
    text = table(results, options)
    print(text)
    stem = RESULTS / (options.output or f"long-context-{options.device}")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backends", nargs="+", default=["segments", "sdpa"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--base", help="a model's folder, which is cut to --layers; else a narrow one of random weights"
    )
    parser.add_argument("--output", help="the results' name")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device on this machine")
    return options


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: a row for each length, a column for each backend, exponents and the bar beneath."""
    by_name = {b: [r for r in results if r["backend"] == b] for b in options.backends}
    growth = {b: exponent([r["length"] for r in rows], [r["mebibytes"] for r in rows]) for b, rows in by_name.items()}
    narrow = f"Llama of hidden size {options.hidden} and vocabulary {options.vocabulary:,}"
    what = f"{Path(options.base).name if options.base else narrow}, {options.layers} layers"
    lines = [
        f"# One long sequence on {machine(torch.device(options.device))}",
        "",
        f"{what}, {options.dtype}, LoRA r = 8; gradient checkpointing and chunked loss. One training step: peak MiB "
        f"above the model / seconds. "
        f"torch {torch.__version__}, transformers {transformers.__version__}; `python {' '.join(sys.argv)}`",
        "",
        "| tokens | " + " | ".join(by_name) + " |",
        "|---" * (1 + len(by_name)) + "|",
    ]
    for row in zip(*by_name.values(), strict=True):
        cells = " | ".join(f"{r['mebibytes']:,.0f} / {r['seconds']:.1f}" for r in row)
        lines.append(f"| {row[0]['length']:,} | {cells} |")
    lines.append("| exponent of memory | " + " | ".join(f"{value:.2f}" for value in growth.values()) + " |")
    kept = all(value <= LINEAR for value in growth.values())
    return "\n".join([*lines, "", f"Bar: exponents of memory at most {LINEAR}: {'kept' if kept else 'MISSED'}.", ""])


if __name__ == "__main__":
    main()
