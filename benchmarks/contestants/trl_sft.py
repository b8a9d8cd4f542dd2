"""TRL's SFTTrainer with peft and its packing, as its documentation shows them."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from job import LONGEST, Record, counted, read_job, rows_of
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


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
    rows = rows_of(job, model.config.vocab_size)
    data = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(label != -100) for label in labels]} for ids, labels in rows]
    )
    tokens, supervised = counted(rows)
    a_step = tokens / job.steps
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=max(1, round(a_step / LONGEST)),
            max_steps=job.steps,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            packing=True,
            max_length=LONGEST,
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            gradient_checkpointing=False,
            seed=job.seed,
            bf16=job.dtype == "bfloat16",
            disable_tqdm=True,
        )
        config = LoraConfig(r=job.r, lora_alpha=2 * job.r, target_modules="all-linear", use_dora=job.method == "dora")
        trainer: Any = SFTTrainer(
            model=model, args=arguments, train_dataset=data, peft_config=config, callbacks=[watch]
        )
        trainer.train()
        packs = len(trainer.train_dataset)
    taken = arguments.gradient_accumulation_steps * (job.steps - 1)  # packs are equally full but for the last
    watch.record.report(int(tokens * taken / packs), int(supervised * taken / packs))


if __name__ == "__main__":
    main()
