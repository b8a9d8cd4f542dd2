"""Keys that do not go together, and keys that a run would pass over in silence: refused, with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lowrank.adapters import METHODS
from lowrank.config import RunConfig

CASES = [
    (["quantization={}"], "--set quantization: quantization.load_in_4bit: is false, and so is load_in_8bit; set one to true, "
     "or leave the section out"),
    (["quantization={load_in_4bit: true, load_in_8bit: true}"], "--set quantization: quantization.load_in_4bit: is true, and so "
     "is load_in_8bit; set one to true, or leave the section out"),
    (["quantization.load_in_8bit=true", "quantization.bnb_4bit_quant_type=nf4"], "--set quantization.bnb_4bit_quant_type: is about 4 "
     "bits, and load_in_8bit is true"),
    (["quantization.load_in_4bit=true", "quantization.bits=4"], "--set quantization.bits: bitsandbytes is told by load_in_4bit or "
     "load_in_8bit how many to take; leave it out"),
    (["quantization={quant_method: torchao, bits: 8, load_in_8bit: true}"], "--set quantization: quantization.load_in_8bit: is about "
     "bitsandbytes, and quant_method is torchao; leave it out"),
    (["quantization={quant_method: torchao}"], "--set quantization: quantization.bits: is not set, and torchao is told by it how many "
     "to take"),
    (["quantization={load_in_4bit: true, bnb_4bit_compute_dtype: float16}", "model.compute_dtype=bfloat16"],
     "--set quantization: quantization.bnb_4bit_compute_dtype: products are in one dtype, and model.compute_dtype is bfloat16; "
     "leave one out"),
    (["quantization.load_in_4bit=true", "adapter={method: full}"], "--set adapter: adapter.method: full trains the base's own "
     f"weights, and quantization holds them in few bits; take one of {', '.join(METHODS)}, or leave the section quantization out"),
    (["adapter.init_lora_weights=loftq"], "--set adapter.init_lora_weights: loftq begins with the error of a 4-bit base; set "
     "quantization.load_in_4bit: true"),
    (["adapter={method: adalora, total_step: 9}"], "--set adapter: adapter.total_step: a run counts its own steps; leave it out"),
    (["training.predict_with_generate=true"], "--set training.predict_with_generate: there is nothing to answer: data.eval is not "
     "set"),
    (["training.eval_steps=5"], "--set training.eval_steps: there is nothing to evaluate: data.eval is not set"),
    (["data.max_eval_rows=5"], "--set data.max_eval_rows: there are no rows to limit: data.eval is not set"),
    (["training.tokens_per_batch=16"], "--set training.tokens_per_batch: a pack of 16 tokens may not hold an example of up to "
     "data.max_length (1024); raise the one or lower the other"),
    (["data.packing=false", "training.tokens_per_batch=2048"], "--set training.tokens_per_batch: sizes packs, and data.packing is "
     "false; training.per_device_train_batch_size sizes padded batches"),
    (["training.per_device_train_batch_size=8"], "--set training.per_device_train_batch_size: sizes padded batches, and "
     "data.packing is true; training.tokens_per_batch sizes packs"),
    (["training.torch_compile=true", "training.gradient_checkpointing=selective"], "--set training.gradient_checkpointing: "
     "selective looks at a layer's products one by one, which torch_compile does not let it; take true"),
    (["training.fsdp=true", "training.gradient_checkpointing=selective"], "--set training.gradient_checkpointing: selective "
     "looks at a layer's products one by one, which fsdp does not let it; take true"),
    (["training.offload=layers", "adapter={method: full}"], "--set training.offload: what comes and goes is a frozen base, and "
     "full trains it; take an adapter, or leave offload out"),
    (["training.offload=layers", "quantization.load_in_4bit=true"], "--set training.offload: layers in few bits stay on the "
     "device; leave one of them out"),
    (["training.offload=layers", "training.fsdp=true"], "--set training.offload: fsdp shares layers out between processes; "
     "leave one of them out"),
    (["training.offload=layers", "training.torch_compile=true"], "--set training.offload: torch_compile compiles layers for "
     "weights that stay where they are; leave one of them out"),
    (["training.offload=layers", "training.gradient_checkpointing=selective"], "--set training.offload: offloaded layers run "
     "again as a whole, and selective keeps what their products give; take true"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), CASES, ids=[" ".join(overrides) for overrides, _ in CASES])
def test_what_does_not_go_together(told, good, overrides, message):
    assert told(good, *overrides) == [message]


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantization.load_in_8bit=true"],
        ["quantization={quant_method: torchao, bits: 8}"],
        ["quantization.load_in_4bit=true", "adapter.init_lora_weights=loftq"],
        ["quantization=null", "adapter={method: full}"],
        [
            "data.eval=rows.jsonl",
            "training.predict_with_generate=true",
            "training.eval_steps=5",
            "data.max_eval_rows=5",
        ],
        ["data.packing=false", "training.per_device_train_batch_size=8"],
        ["training.tokens_per_batch=1024"],
    ],
    ids=" ".join,
)
def test_what_does(load, good, overrides):
    load(good, *overrides)


def test_several_at_once(told, good):
    text = good + "  eval_steps: 3\n  predict_with_generate: true\n  tokens_per_batch: 16\n"
    assert [line.split(": ")[1] for line in told(text)] == [
        "training.eval_steps",
        "training.predict_with_generate",
        "training.tokens_per_batch",
    ]


def test_from_python_too():
    values = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o", "eval_steps": 3}}
    with pytest.raises(ValidationError, match=r"training\.eval_steps: there is nothing to evaluate"):
        RunConfig.model_validate(values)
