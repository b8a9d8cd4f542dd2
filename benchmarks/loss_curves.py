"""The losses of lowrank and of peft, step by step: same weights, same first adapter, same batches, float32.

    python benchmarks/loss_curves.py .cache/models/smollm2-135m-instruct --steps 50

lowrank trains packs without padding through its own loop and loss; peft trains the same rows padded, with a mask,
through the model's own loss. Both clip gradients to norm 1 and take AdamW's steps. Writes
benchmarks/results/loss-curves-<method>-cpu.md and .json; the exit status is 1 where a loss is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator

import lowrank
from lowrank.attention import set_attention
from lowrank.data import BatchPlan, Example, Examples, Members
from lowrank.models import load_model
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import supervised_loss
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.schedule import build_schedule
from lowrank.training.optimisers.settings import OptimizerSettings
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.transforms.norms import lean_norms

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "contestants"))
from job import IGNORED, Job, Row, rows_of  # noqa: E402

TOLERANCE = 1e-4
MAX_NORM = 1.0


class InOrder(BatchPlan):
    """`batch_size` rows after another make a pack."""

    def _planned(self, epoch: int) -> list[Members]:
        borders = range(self.batch_size, len(self.examples), self.batch_size)
        return [Members(rows) for rows in np.split(np.arange(len(self.examples)), borders)]


class Losses(Callback):
    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        self.taken.append(metrics.loss)


def of_lowrank(model: Any, rows: Sequence[Row], at_a_time: int, learning_rate: float) -> list[float]:
    """A loss a step, of a model with its adapter in."""
    examples = Examples.of([Example(ids, [label != IGNORED for label in labels]) for ids, labels in rows], "all")
    plan = InOrder(examples, True, at_a_time, None, 0, 0, False)
    steps = len(plan.epoch(0))
    set_attention(model, "auto", packing=True)
    lean_norms(model)
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate))
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, total_steps=steps)
    losses = Losses()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = Run(model, optimizer, schedule, scaler, Path(), steps, callbacks=[losses])
    fit(run, plan, supervised_loss(model), accelerator=Accelerator(cpu=True), max_grad_norm=MAX_NORM)
    return losses.taken


def of_peft(model: Any, rows: Sequence[Row], at_a_time: int, learning_rate: float) -> list[float]:
    """The same of a peft model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for start in range(0, len(rows), at_a_time):
        loss = model(**padded(rows[start : start + at_a_time])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """input_ids, labels and attention_mask, (rows, longest) each."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
    }


def curves(base: Callable[[], Any], job: Job, *, dora: bool = False) -> tuple[list[float], list[float]]:
    """The losses of lowrank and of peft.

    Args:
        base: Loads the model, the same at every call.
        job: Rank, rows, steps, seed and learning rate.
        dora: Instead of LoRA.
    """
    torch.manual_seed(job.seed)
    ours = lowrank.wrap(base(), lowrank.LoraConfig(r=job.r, lora_alpha=2 * job.r, use_dora=dora))
    with tempfile.TemporaryDirectory() as folder:
        lowrank.save(ours, folder)
        theirs = peft.PeftModel.from_pretrained(base(), folder, is_trainable=True)
    rows = rows_of(job, ours.config.vocab_size)
    return of_lowrank(ours, rows, job.rows, job.learning_rate), of_peft(theirs, rows, job.rows, job.learning_rate)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Relative, over all steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of lowrank and of peft, step by step.")
    parser.add_argument("base")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4, help="in a step")
    parser.add_argument("--mean-length", type=int, default=100)
    parser.add_argument("--dora", action="store_true")
    options = parser.parse_args()
    job = Job(options.base, rows=options.rows, steps=options.steps, mean_length=options.mean_length, learning_rate=1e-3)
    ours, theirs = curves(lambda: load_model(options.base, dtype="float32", device="cpu"), job, dora=options.dora)
    difference = largest_difference(ours, theirs)
    shown = [*range(0, options.steps, 10), options.steps - 1]
    lines = [
        f"# Losses of lowrank and of peft, same batches, float32: {'DoRA' if options.dora else 'LoRA'}, r = {job.r}",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}; `python {' '.join(sys.argv)}`",
        "",
        "| step | lowrank | peft |",
        "|---|---|---|",
        *(f"| {step + 1} | {ours[step]:.6f} | {theirs[step]:.6f} |" for step in shown),
        "",
        f"Largest relative difference over {options.steps} steps: {difference:.1e} (at most {TOLERANCE:.0e} is asked).",
    ]
    stem = HERE / "results" / f"loss-curves-{'dora' if options.dora else 'lora'}-cpu"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(
        json.dumps({"lowrank": ours, "peft": theirs}, indent=1) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))
    sys.exit(difference > TOLERANCE)


if __name__ == "__main__":
    main()
