"""lowrank: the loop, packs and loss that `lowrank train` uses."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from job import IGNORED, Job, Record, counted, read_job, rows_of
from transformers import PreTrainedModel

import lowrank
from lowrank.attention import set_attention
from lowrank.data import Example, Examples, plan_batches
from lowrank.models import load_model
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import supervised_loss
from lowrank.training.machine.memory import few_kernels_kept, freed_blocks_kept
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.schedule import build_schedule
from lowrank.training.optimisers.settings import OptimizerSettings
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.steps import StepSize
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.layers import compile_layers
from lowrank.training.transforms.norms import lean_norms


class Watch(Callback):
    def __init__(self) -> None:
        self.record = Record()

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        self.record.add(metrics.tokens, metrics.supervised)
        self.record.step(metrics.loss)


def wrapped(job: Job) -> PreTrainedModel:
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": job.dtype}
    quantization = four_bits if job.method == "qlora" else None
    model = load_model(job.model, dtype=job.dtype, quantization=quantization, device=job.device)
    config = lowrank.LoraConfig(r=job.r, lora_alpha=2 * job.r, use_dora=job.method == "dora")
    return lowrank.wrap(model, config)


def main(*, compiled: bool = False, share: bool = True) -> None:
    job = read_job()
    few_kernels_kept()
    torch.manual_seed(job.seed)
    model = wrapped(job)
    set_attention(model, "auto", packing=True)
    if compiled:
        compile_layers(model)
    else:
        lean_norms(model)
        keep_less(model)
    rows = rows_of(job, model.config.vocab_size)
    examples = Examples.of([Example(ids, [label != IGNORED for label in labels]) for ids, labels in rows], "all")
    step = counted(rows)[0] // job.steps  # as many tokens as the others have on average
    plan = plan_batches(
        examples,
        packing=True,
        batch_size=1,
        max_tokens=job.pack,
        pad_token_id=0,
        seed=job.seed,
        share_prefixes=share,
        step_tokens=step,
    )
    size = StepSize(tokens=step)
    optimizer = build_optimizer(model, OptimizerSettings(job.learning_rate))
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, total_steps=job.steps)
    watch = Watch()
    scaler = torch.amp.GradScaler(job.device, enabled=False)
    run = Run(model, optimizer, schedule, scaler, Path(), job.steps, callbacks=[watch])
    with freed_blocks_kept():
        fit(run, plan, supervised_loss(model), accelerator=Accelerator(cpu=job.device == "cpu"), size=size)
    watch.record.report(job, ("torch", "transformers", "lowrank", "accelerate"))


if __name__ == "__main__":
    main()
