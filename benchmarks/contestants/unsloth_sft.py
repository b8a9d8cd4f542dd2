"""Unsloth's model and adapter under TRL's SFTTrainer with packing; needs a CUDA device and `unsloth`.

Without gradient checkpointing, like the others: Unsloth's own takes time for memory.
"""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel  # isort: skip  # patches the others: must come first

import torch
from job import Job, read_job
from trl_sft import LIBRARIES, train

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(job: Job) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=job.pack,
        dtype=getattr(torch, job.dtype),
        load_in_4bit=job.method == "qlora",
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=job.r,
        lora_alpha=2 * job.r,
        lora_dropout=0,
        bias="none",
        target_modules=LINEAR,
        use_gradient_checkpointing=False,
        use_dora=job.method == "dora",
        random_state=job.seed,
    )


def main() -> None:
    job = read_job()
    train(job, adapted(job), None, (*LIBRARIES, "unsloth"))


if __name__ == "__main__":
    main()
