"""What several adapters in one pass cost, against one adapter over the same tokens, and peft's mixed batch.

    python benchmarks/routing.py                    # CPU, float32 and bfloat16, one thread; some minutes

A pack of 8 segments of 100 tokens through layers of SmolLM2-135M's shapes and of a Llama of a billion weights (hidden
size 2,048, 8,192 in its MLP), forward and backward, LoRA of rank 16 on all linear layers: `using` one adapter, `routed`
with 8 by segments and, over 8 rows of 100 tokens, by rows, with 8 among 64 that are loaded too; `peft`: a wrapped
twin's mixed batch (`adapter_names`), forward alone as peft allows no more, beside its own one adapter and lowrank's.
All sides in turn, seconds of the CPU; medians, as multiples of one adapter. Writes benchmarks/results/routing-cpu.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from meter import machine

import lowrank

HERE = Path(__file__).parent
SIZES: dict[str, dict[str, Any]] = {
    "SmolLM2's, 2 layers": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 2,
    },
    "a billion's, 1 layer": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 1,
    },
}  # fmt: skip
ADAPTERS, LENGTH, LOADED = 8, 100, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"# Several adapters in one pass, {machine(torch.device('cpu'))}\n",
        f"{_processor()}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; "
        f"`python {' '.join(sys.argv)}`. Multiples of one adapter over the same 800 tokens, medians of "
        f"{options.repeats} in turn (least and most in brackets); milliseconds of the CPU in the first column.\n",
        "| layers | dtype | pass | one adapter | 8 by segments | the same of 64 loaded | 8 by rows | peft, 8 by rows |",
        "|---" * 8 + "|",
    ]
    for name, sizes in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (True, False):
                lines.append(_row(name, sizes, dtype, backward, options.repeats))
                print(lines[-1], flush=True)
    (HERE / "results" / "routing-cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, sizes: Mapping[str, Any], dtype: torch.dtype, backward: bool, repeats: int) -> str:
    few, many = _model(sizes, dtype, ADAPTERS), _model(sizes, dtype, LOADED)
    steps = {
        "one": _step(few, backward, lambda: lowrank.using(few, "a0"), rows=False),
        "segments": _step(few, backward, lambda: _by_segments(few), rows=False),
        "loaded": _step(many, backward, lambda: _by_segments(many), rows=False),
        "one by rows": _step(few, backward, lambda: lowrank.using(few, "a0"), rows=True),
        "rows": _step(few, backward, lambda: lowrank.routed(few, NAMES), rows=True),
    }
    if not backward:
        steps |= _peft_steps(sizes, dtype)
    seconds = _in_turn(steps, repeats)
    cells = [f"{statistics.median(seconds['one']) * 1e3:.0f}"]
    cells += [_times(seconds, side, "one") for side in ("segments", "loaded")]
    cells += [_times(seconds, "rows", "one by rows"), "-" if backward else _times(seconds, "peft", "peft one")]
    return f"| {name} | {str(dtype)[6:]} | {'forward, backward' if backward else 'forward'} | {' | '.join(cells)} |"


NAMES = [f"a{number}" for number in range(ADAPTERS)]


def _by_segments(model: Any) -> Any:
    return lowrank.routed(model, NAMES, [LENGTH] * ADAPTERS)


def _base(sizes: Mapping[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=2048)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def _model(sizes: Mapping[str, Any], dtype: torch.dtype, adapters: int) -> Any:
    model = _base(sizes, dtype)
    for number in range(adapters):
        lowrank.wrap(model, lowrank.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False), f"a{number}")
    lowrank.set_attention(model, "segments", packing=True)
    return model


def _step(model: Any, backward: bool, block: Callable[[], Any], rows: bool) -> Callable[[], None]:
    ids = torch.arange(ADAPTERS * LENGTH).remainder(64)
    places = torch.arange(LENGTH).repeat(ADAPTERS)
    shape = (ADAPTERS, LENGTH) if rows else (1, ADAPTERS * LENGTH)
    embedded = model.get_input_embeddings()(ids.view(shape)).detach().requires_grad_(backward)
    lengths = None if rows else [LENGTH] * ADAPTERS

    def step() -> None:
        with torch.set_grad_enabled(backward), lowrank.segments(model, lengths), block():
            out = model(inputs_embeds=embedded, position_ids=places.view(shape), use_cache=False).logits
            if backward:
                out.sum().backward()
                model.zero_grad(set_to_none=True)

    return step


def _peft_steps(sizes: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    config = peft.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(_base(sizes, dtype), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.set_adapter(NAMES[0])
    model.to(dtype).eval()
    ids = torch.arange(ADAPTERS * LENGTH).remainder(64).view(ADAPTERS, LENGTH)

    @torch.no_grad()
    def one() -> None:
        model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def mixed() -> None:
        model(input_ids=ids, use_cache=False, adapter_names=NAMES)

    return {"peft one": one, "peft": mixed}


def _in_turn(steps: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the CPU of each step, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    return {name: taken[1:] for name, taken in seconds.items()}


def _times(seconds: Mapping[str, list[float]], side: str, against: str) -> str:
    ratios = [one / other for one, other in zip(seconds[side], seconds[against], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
