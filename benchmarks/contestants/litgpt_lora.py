"""LitGPT: the parts of its recipe `litgpt finetune_lora`: rows padded together, the head in chunks.

Its own GPT with LoRA, conversion of weights, collation and loss, under Lightning's Fabric; the precision is that of the
adapters too. `--prepare JOB` converts the weights once, as `litgpt convert_to_litgpt` does for its users.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from job import IGNORED, Job, Record, read_config, read_job, rows_of
from lightning.fabric.plugins import BitsandbytesPrecision
from litgpt.data.base import get_sft_collate_fn
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer, load_checkpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

PADDING = 0
PRECISION = {"bfloat16": "bf16-true", "float32": "32-true"}


def config_of(job: Job) -> Config:
    """What LitGPT's own table says of SmolLM2 and of Llama, from the config at hand."""
    theirs = read_config(job.model)
    return Config(
        name=Path(job.model).name,
        block_size=theirs["max_position_embeddings"],
        vocab_size=theirs["vocab_size"],
        padded_vocab_size=theirs["vocab_size"],
        n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"],
        n_embd=theirs["hidden_size"],
        n_query_groups=theirs["num_key_value_heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=theirs["intermediate_size"],
        rope_base=int(theirs["rope_parameters"]["rope_theta"]),
        norm_eps=theirs["rms_norm_eps"],
        lora_r=job.r,
        lora_alpha=2 * job.r,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
    )


def checkpoint_of(job: Job) -> Path:
    folder = Path(job.model)
    return folder.parent / f"{folder.name}-litgpt" / "lit_model.pth"


def convert(job: Job) -> None:
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(config_of(job), {}, weights, load_file(f"{job.model}/model.safetensors"))
    checkpoint_of(job).parent.mkdir(exist_ok=True)
    torch.save(weights, checkpoint_of(job))


def batches_of(job: Job, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Padded rows, without end."""
    data: Any = [
        {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)},
        }
        for ids, labels in rows_of(job, vocabulary)
    ]
    collate = get_sft_collate_fn(max_seq_length=job.longest, pad_id=PADDING, ignore_index=IGNORED)
    generator = torch.Generator().manual_seed(job.seed)
    loader = DataLoader(data, batch_size=job.padded_together, shuffle=True, generator=generator, collate_fn=collate)
    while True:
        yield from loader


def main() -> None:
    job = read_job()
    if sys.argv[1] == "--prepare":
        convert(job)
        return
    if job.method == "dora":
        raise NotImplementedError("LitGPT has no DoRA")
    quantised = BitsandbytesPrecision("nf4", getattr(torch, job.dtype)) if job.method == "qlora" else None
    fabric = lightning.Fabric(
        accelerator=job.device, devices=1, precision=None if quantised else PRECISION[job.dtype], plugins=quantised
    )
    fabric.launch()
    fabric.seed_everything(job.seed)
    config = config_of(job)
    with fabric.init_module():
        model: Any = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    settings = {"lr": job.learning_rate, "weight_decay": 0.0}
    made = instantiate_torch_optimizer({"class_path": "torch.optim.AdamW", "init_args": settings}, model.parameters())
    optimizer: Any = fabric.setup_optimizers(made)
    load_checkpoint(fabric, model, checkpoint_of(job), strict=False)
    model.max_seq_length = job.longest
    batches, record = batches_of(job, config.vocab_size), Record()
    parts = job.rows // job.padded_together
    for _ in range(job.steps):
        total = torch.zeros((), device=fabric.device)
        for part in range(parts):
            batch = next(batches)
            ids, labels = batch["input_ids"].to(fabric.device), batch["labels"].to(fabric.device)
            record.add(int((ids != PADDING).sum()), int((labels != IGNORED).sum()))
            with fabric.no_backward_sync(model, enabled=part < parts - 1):
                logits = model(ids, lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, labels[..., 1:])
                fabric.backward(loss / parts)
            total += loss.detach() / parts
        optimizer.step()
        optimizer.zero_grad()
        record.step(float(total))
    record.report(job, ("torch", "litgpt", "lightning"))


if __name__ == "__main__":
    main()
