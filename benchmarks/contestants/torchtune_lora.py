"""torchtune: the parts of its recipe lora_finetune_single_device, with the data set packed.

Its own model builder, weight conversion, packed data set, collation, chunked loss and scaling of gradients; AdamW fused
as in its configs. The recipe's dtype is that of the adapters too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from job import IGNORED, Job, Record, packs_a_step, read_config, read_job, rows_of
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchtune import training
from torchtune.data import padded_collate_packed
from torchtune.datasets import PackedDataset
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

PADDING = 0


def model_of(job: Job, config: dict) -> Any:
    """The recipe's `_setup_model`."""
    dtype = getattr(torch, job.dtype)
    with training.set_default_dtype(dtype), torch.device(job.device):
        model = lora_llama3_2(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            embed_dim=config["hidden_size"],
            max_seq_len=job.pack,
            intermediate_dim=config["intermediate_size"],
            norm_eps=config["rms_norm_eps"],
            rope_base=config["rope_parameters"]["rope_theta"],
            scale_factor=1,  # plain rotary embeddings
            tie_word_embeddings=config["tie_word_embeddings"],
            lora_rank=job.r,
            lora_alpha=2 * job.r,
            use_dora=job.method == "dora",
            quantize_base=job.method == "qlora",
        )
    adapters = get_adapter_params(model)
    set_trainable_params(model, adapters)
    weights = load_file(f"{job.model}/model.safetensors")
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    missing, unexpected = model.load_state_dict(hf_to_tune(weights, *heads, config["hidden_size"]), strict=False)
    if unexpected or set(missing) - set(adapters):
        raise RuntimeError(f"weights do not fit: {unexpected}, {sorted(set(missing) - set(adapters))}")
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    return model


def batches_of(job: Job, rows: list[tuple[list[int], list[int]]]) -> Iterator[dict[str, torch.Tensor]]:
    """Packs without end, one a batch."""
    data: Any = [{"tokens": ids, "labels": labels} for ids, labels in rows]
    packs = PackedDataset(data, max_seq_len=job.pack, padding_idx=PADDING)
    generator = torch.Generator().manual_seed(job.seed)
    loader = DataLoader(packs, batch_size=1, shuffle=True, generator=generator, collate_fn=padded_collate_packed)
    while True:
        yield from loader


def main() -> None:
    job = read_job()
    torch.manual_seed(job.seed)
    config = read_config(job.model)
    model = model_of(job, config)
    rows = rows_of(job, config["vocab_size"])
    batches, record = batches_of(job, rows), Record()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=job.learning_rate, weight_decay=0.0, fused=True
    )
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    last = torch.full((1, 1), IGNORED, device=job.device)
    for _ in range(job.steps):
        total, supervised = torch.zeros((), device=job.device), 0
        for _ in range(packs_a_step(job, rows)):
            batch = {name: tensor.to(job.device) for name, tensor in next(batches).items()}
            labels = batch.pop("labels")
            count = int((labels != IGNORED).sum())
            record.add(int((batch["tokens"] != PADDING).sum()), count)
            loss = loss_of(model(**batch), torch.hstack((labels[..., 1:], last))) * count
            total, supervised = total + loss.detach(), supervised + count
            loss.backward()
        training.scale_grads(model, torch.tensor(1 / supervised, device=job.device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.step(float(total) / supervised)
    record.report(job, ("torch", "torchtune", "torchao"))


if __name__ == "__main__":
    main()
