"""peft with transformers' Trainer as their documentation shows it: rows padded together, eight at a time."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from job import Record, counted, read_job, rows_of
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

AT_A_TIME = 8


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.record = Record()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if logs and "loss" in logs:
            self.record.step(logs["loss"])


def main() -> None:
    job = read_job()
    torch.manual_seed(job.seed)
    options = {}
    if job.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, job.dtype)
        )
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype), **options)
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
            per_device_train_batch_size=AT_A_TIME,
            gradient_accumulation_steps=job.rows // AT_A_TIME,
            max_steps=job.steps,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=job.seed,
            bf16=job.dtype == "bfloat16",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[watch],
        )
        trainer.train()
    # The order is shuffled: of all rows, the share of the steps after the first.
    tokens, supervised = counted(rows)
    share = (job.steps - 1) / job.steps
    watch.record.report(int(tokens * share), int(supervised * share))


if __name__ == "__main__":
    main()
