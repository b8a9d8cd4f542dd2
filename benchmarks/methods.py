"""What a DoRA step costs beside a LoRA step, here and in peft; and what putting an adapter in costs.

    python benchmarks/methods.py .cache/models/smollm2-135m-instruct --tokens 512 --repeats 5

The sides take turns: a noisy machine is noisy for all of them. Same weights, rank, targets and tokens; a step is
forward, backward and optimiser. Writes benchmarks/results/methods-<device>-<dtype>.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lowrank
from lowrank.models import load_model
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.transforms.layers import compile_layers

RESULTS = Path(__file__).parent / "results"
BFLOAT16, COMPILED = "lowrank LoRA, adapters in bfloat16", "lowrank LoRA, layers compiled"


def stepper(model: Any, tokens: int) -> Callable[[], float]:
    """Seconds of one training step on the same batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids = (torch.arange(tokens) * 7919 % model.config.vocab_size)[None]
    model.train()

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def sides(base: str) -> dict[str, Any]:
    """The models that are compared, each with its own copy of the weights."""
    shared = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    made: dict[str, Any] = {}
    for method, dora in (("LoRA", False), ("DoRA", True)):
        config = lowrank.LoraConfig(use_dora=dora, r=16, lora_alpha=32)
        made[f"lowrank {method}"] = lowrank.wrap(load_model(base, dtype="bfloat16", device="cpu"), config)
        theirs = peft.LoraConfig(use_dora=dora, **shared)
        made[f"peft {method}"] = peft.get_peft_model(load_model(base, dtype="bfloat16", device="cpu"), theirs)
    for variant in (BFLOAT16, COMPILED):
        config = lowrank.LoraConfig(r=16, lora_alpha=32)
        made[variant] = lowrank.wrap(load_model(base, dtype="bfloat16", device="cpu"), config)
    for parameter in made[BFLOAT16].parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    compile_layers(made[COMPILED])
    return made


def putting_in() -> tuple[float, float]:
    """Seconds of `wrap` and of `get_peft_model` on 32 layers of hidden size 1024."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=32, num_attention_heads=16, vocab_size=1000
    )
    took = []
    for put in (
        lambda model: lowrank.wrap(model, lowrank.LoraConfig(r=16)),
        lambda model: peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear")),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        began = time.perf_counter()
        put(model)
        took.append(time.perf_counter() - began)
    return took[0], took[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="DoRA beside LoRA, here and in peft.")
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    steps = {name: stepper(model, options.tokens) for name, model in sides(options.base).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with freed_blocks_kept():
        for step in steps.values():
            step()
        for _ in range(options.repeats):
            for name, step in steps.items():
                seconds[name].append(step())
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ours, theirs = putting_in()
    lines = [
        f"# DoRA beside LoRA: bfloat16, {options.tokens} tokens a step, r = 16, all-linear",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}; `python benchmarks/methods.py {options.base} "
        f"--tokens {options.tokens} --repeats {options.repeats}`",
        "",
        "| side | median s | min | max |",
        "|---|---|---|---|",
        *(f"| {name} | {medians[name]:.2f} | {min(t):.2f} | {max(t):.2f} |" for name, t in seconds.items()),
        "",
        f"DoRA costs {medians['lowrank DoRA'] / medians['lowrank LoRA']:.2f} times LoRA here, "
        f"{medians['peft DoRA'] / medians['peft LoRA']:.2f} times in peft. "
        f"LoRA is {medians['peft LoRA'] / medians['lowrank LoRA']:.2f} times, DoRA "
        f"{medians['peft DoRA'] / medians['lowrank DoRA']:.2f} times as fast as peft's.",
        "",
        f"Adapters in float32 cost {medians['lowrank LoRA'] / medians[BFLOAT16]:.2f} times those in bfloat16. "
        f"Compiled layers take {medians[COMPILED] / medians['lowrank LoRA']:.2f} of the time (compiling apart).",
        "",
        f"Putting r = 16 into 32 layers of hidden size 1024 (all-linear): {ours:.2f} s, peft {theirs:.2f} s.",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "methods-cpu-bfloat16.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
