"""peft with transformers' Trainer as their documentation shows it: rows padded together, eight at a time."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from job import read_job, rows_of
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from watch import Watch, base_of, counting, settings_of


def main() -> None:
    job = read_job()
    torch.manual_seed(job.seed)
    model = base_of(job)
    if job.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=job.r, lora_alpha=2 * job.r, target_modules="all-linear", use_dora=job.method == "dora", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    rows = rows_of(job, model.config.vocab_size)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.padded_together,
            gradient_accumulation_steps=job.rows // job.padded_together,
            **settings_of(job),
        )
        trainer = counting(Trainer, watch.record)(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[watch],
        )
        trainer.train()
    watch.record.report(job, ("torch", "transformers", "peft", "accelerate"))


if __name__ == "__main__":
    main()
