"""What the contestants that use transformers' Trainer share: the base, and a trainer whose steps are recorded."""

from __future__ import annotations

from typing import Any

import torch
from job import IGNORED, Job, Record
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback


class Watch(TrainerCallback):
    """Ends a step of the record when the trainer logs its loss; `logging_steps` is 1."""

    def __init__(self) -> None:
        self.record = Record()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if logs and "loss" in logs:
            self.record.step(logs["loss"])


def counting(trainer: type, record: Record) -> Any:
    """The same kind of trainer; tells the record what every batch holds."""

    class Counting(trainer):
        def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            record.add(tokens, int((inputs["labels"] != IGNORED).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counting


def base_of(job: Job) -> Any:
    """The base as the libraries' documentation loads it."""
    options = {}
    if job.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, job.dtype)
        )
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype), **options)


def settings_of(job: Job) -> dict[str, Any]:
    """The training arguments that do not differ between them."""
    return {
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": job.device == "cpu",
        "seed": job.seed,
        "bf16": job.dtype == "bfloat16",
        "disable_tqdm": True,
    }
