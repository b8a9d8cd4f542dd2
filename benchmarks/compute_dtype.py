"""Products in another dtype than the weights': speed, and what `model.compute_dtype: auto` makes of it here.

    python benchmarks/compute_dtype.py                    # two threads, some minutes
    python benchmarks/compute_dtype.py --qlora            # a 4-bit base beside

One step (forward, backward, optimiser) of SmolLM2-135M with LoRA r = 16 on a pack of 1,600 tokens of
examples/data/toolcalls_train.jsonl, nothing shared, as `configs/quickstart.yaml` sets it up. All sides hold their own
weights in one process and take turns; medians count. Writes benchmarks/results/compute-dtype-cpu.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from yardstick import operations_a_token, operations_beside, product_rate

from lowrank.attention import segments
from lowrank.config import load_config
from lowrank.config.sections import TrainingSection
from lowrank.data.batches.batch import Batch
from lowrank.recipes.parts.optimisation import optimizer_for
from lowrank.recipes.parts.setup import Setup, set_up
from lowrank.storage.machine_figures import processor
from lowrank.training.machine.memory import few_kernels_kept, freed_blocks_kept

ROOT = Path(__file__).parent.parent
BASE = ".cache/models/smollm2-135m-instruct"
TOKENS = 1600
PLAIN = f"training.tokens_per_batch={TOKENS}", "data.share_prefixes=false", "training.predict_with_generate=false"
SIDES = {
    "weights and products in bfloat16": ("bfloat16", "bfloat16"),
    "weights in bfloat16, products in float32": ("bfloat16", "float32"),
    "weights and products in float32": ("float32", "float32"),
    "auto, weights in bfloat16": ("bfloat16", "auto"),
}


@dataclass(frozen=True)
class Side:
    """What one of them is, and a step of it.

    Attributes:
        says: Its line of the plan.
        held: Bytes of the model's weights.
        batch: The pack.
        step: Takes one, and gives the seconds.
    """

    says: str
    held: int
    batch: Batch
    step: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--qlora", action="store_true", help="add a base in nf4, products by auto")
    options = parser.parse_args()
    few_kernels_kept()
    settings = {name: (held, products, []) for name, (held, products) in SIDES.items()}
    if options.qlora:
        settings["QLoRA, nf4, auto"] = ("bfloat16", "auto", ["quantization.load_in_4bit=true"])
    sides = {name: side(*setting) for name, setting in settings.items()}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    with freed_blocks_kept():
        for one in sides.values():
            one.step()
        for _ in range(options.repeats):
            for name, one in sides.items():
                taken[name].append(one.step())
    text = report(sides, taken, f"python {' '.join(sys.argv)}")
    (ROOT / "benchmarks" / "results" / "compute-dtype-cpu.md").write_text(text, encoding="utf-8")
    print(text)


def side(held: str, products: str, more: list[str]) -> Side:
    """Sets it up as a run would."""
    dtypes = [f"model.dtype={held}", f"model.compute_dtype={products}"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*dtypes, *PLAIN, *more])
    setup = set_up(config, torch.device("cpu"))
    weights = sum(p.numel() * p.element_size() for p in setup.model.parameters() if not p.requires_grad)
    batch = setup.plan.largest()
    return Side(str(setup.products), weights, batch, _stepper(setup, batch, config.training))


def _stepper(setup: Setup, batch: Batch, training: TrainingSection) -> Callable[[], float]:
    model, optimizer = setup.model.train(), optimizer_for(training, setup.model)

    def step() -> float:
        began = time.perf_counter()
        with segments(model, batch.segments, batch.parents, batch.padded):
            (setup.loss(model, batch) / batch.supervised).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def report(sides: dict[str, Side], taken: dict[str, list[float]], command: str) -> str:
    """The results' page."""
    batch = sides["auto, weights in bfloat16"].batch
    lengths = batch.segments or []
    tokens = sum(lengths)
    rates = {dtype: product_rate(BASE, getattr(torch, dtype), "cpu") for dtype in ("float32", "bfloat16")}
    base = operations_a_token(BASE, batch.supervised / tokens)
    needed = base + operations_beside(BASE, 16, lengths)
    lines = [
        f"# In which dtype products are fastest: a pack of {tokens:,} tokens",
        "",
        f"{processor()}, {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; `{command}`. Plain products of a layer's shapes: "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
        + ". Medians of steps in turn.",
        "",
        "Of the better rate: what the base's products need alone, and with the low-rank products and attention.",
        "",
        "| side | tokens a second | min | max | weights, MiB | base | all |",
        "|---|---|---|---|---|---|---|",
    ]
    best = max(rates.values())
    for name, one in sides.items():
        speed = [tokens / seconds for seconds in taken[name]]
        median = statistics.median(speed)
        lines.append(
            f"| {name} | {median:.0f} | {min(speed):.0f} | {max(speed):.0f} | {one.held / 2**20:.0f} "
            f"| {base * median / best:.0%} | {needed * median / best:.0%} |"
        )
    lines += ["", f"auto says: products {sides['auto, weights in bfloat16'].says}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
