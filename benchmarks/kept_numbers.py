"""How many numbers a layer leaves behind for its backward pass, by architecture: counted, not timed.

    python benchmarks/kept_numbers.py

Layers of real widths in float32, LoRA r = 16 on all linear layers, one pack of 512 tokens. What the first of two layers
adds to what one keeps is a layer's own: as transformers' code has it, with lowrank's adapters and attention, and with
`lean_norms` and `keep_less`, as a run sets it up. Writes benchmarks/results/kept-numbers.md.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import lowrank
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.norms import lean_norms
from lowrank.training.transforms.shared_inputs import share_inputs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from kept import kept_numbers  # noqa: E402  (the tests count in the same way)

TOKENS = 512
BAR = 6600  # numbers a token of SmolLM2's layer

_SMALL = {"vocab_size": 1024, "attention_dropout": 0.0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama (SmolLM2 135M)": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "heads": (9, 3, 64)},
    "qwen3 (0.6B)": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "heads": (16, 8, 128)},
    "gemma2 (2B)": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "heads": (8, 4, 256)},
    "phi3 (mini)": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "heads": (32, 32, 96)},
    "gpt2 (small)": {"model_type": "gpt2", "n_embd": 768, "n_head": 12},
}


def model_of(spec: dict[str, Any], layers: int) -> PreTrainedModel:
    """Of random weights, adapters in."""
    told = {name: value for name, value in spec.items() if name != "heads"}
    if "heads" in spec:
        query, key, size = spec["heads"]
        told |= _SMALL | {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": size, "pad_token_id": 0}
        told["num_hidden_layers"] = layers
    else:
        told |= {"vocab_size": 1024, "n_layer": layers, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.AutoConfig.for_model(**told)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lowrank.wrap(model, lowrank.LoraConfig(r=16, target_modules="all-linear"))
    lowrank.set_attention(model, "segments", packing=True)
    return model.train()


def layers_own(spec: dict[str, Any], change: Callable[[PreTrainedModel], object]) -> float:
    """Numbers a token."""
    ids = torch.arange(TOKENS)[None] % 1000
    found = []
    for layers in (1, 2):
        model = model_of(spec, layers)
        change(model)
        found.append(kept_numbers(functools.partial(_logits, model, ids)))
    return (found[1] - found[0]) / TOKENS


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _less(model: PreTrainedModel) -> None:
    lean_norms(model)
    keep_less(model)
    share_inputs(model)


SIDES: dict[str, Callable[[PreTrainedModel], object]] = {
    "as transformers has it": lambda model: None,
    "as a run sets it up": _less,
}


def main() -> None:
    lines = [
        "# Numbers that a layer keeps for its backward pass",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}; `python {' '.join(sys.argv)}`. A token, "
        f"float32, LoRA r = 16 on all linear layers, a pack of {TOKENS}.",
        "",
        "| layer | " + " | ".join(SIDES) + " | of the first |",
        "|---" * (len(SIDES) + 2) + "|",
    ]
    smollm = 0.0
    for name, spec in ARCHITECTURES.items():
        counts = [layers_own(spec, change) for change in SIDES.values()]
        smollm = smollm or counts[-1]
        cells = " | ".join(f"{count:,.0f}" for count in counts)
        lines.append(f"| {name} | {cells} | {counts[-1] / counts[0]:.0%} |")
    lines += ["", f"Bar: SmolLM2's at most {BAR:,}: {'kept' if smollm <= BAR else 'MISSED'}.", ""]
    (ROOT / "benchmarks" / "results" / "kept-numbers.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
