"""TRL's SFTTrainer with peft and its packing, as its documentation shows them."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from job import Job, packs_a_step, read_job, rows_of
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from watch import Watch, base_of, counting, settings_of

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


def train(job: Job, model: Any, config: LoraConfig | None, libraries: tuple[str, ...], **options: Any) -> None:
    """Trains and reports.

    Args:
        job: What to do.
        model: The base, or with no `config` a model that has its adapter already.
        config: The adapter.
        libraries: Whose versions are told.
        options: More of SFTConfig.
    """
    rows = rows_of(job, model.config.vocab_size)
    data = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(label != -100) for label in labels]} for ids, labels in rows]
    )
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=packs_a_step(job, rows),
            packing=True,
            max_length=job.pack,
            completion_only_loss=True,
            gradient_checkpointing=False,
            **settings_of(job),
            **options,
        )
        trainer = counting(SFTTrainer, watch.record)(
            model=model, args=arguments, train_dataset=data, peft_config=config, callbacks=[watch]
        )
        trainer.train()
    watch.record.report(job, libraries)


def adapter_of(job: Job) -> LoraConfig:
    return LoraConfig(r=job.r, lora_alpha=2 * job.r, target_modules="all-linear", use_dora=job.method == "dora")


def main() -> None:
    job = read_job()
    torch.manual_seed(job.seed)
    train(job, base_of(job), adapter_of(job), LIBRARIES)


if __name__ == "__main__":
    main()
