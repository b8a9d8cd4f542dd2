"""What the documents show is run."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny import tiny_llama

import lowrank
from lowrank.adapters import METHODS

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_method_that_contributing_adds():
    scope: dict = {}
    try:
        for block in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
            exec(block, scope)
        model = lowrank.wrap(tiny_llama(), scope["LoraFaConfig"](r=4))
        model(torch.arange(3, 9)[None]).logits.sum().backward()
        layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
        assert type(layer) is scope["LoraFaLayer"]
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad is not None
    finally:
        METHODS.pop("lora_fa", None)


def test_the_readme_names_verbs_and_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"examples/[\w/.]+\w", readme):
        assert (ROOT / path).exists()
    for name in re.findall(r"lowrank\.(\w+)\(", readme):
        assert name in lowrank.__all__
