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


def test_every_measured_number_stands_in_the_file_that_it_names():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Measured")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) >= 5
    for _, found, where in rows:
        path = ROOT / re.search(r"\(((?:benchmarks|examples/claims)/results/[\w.-]+)\)", where)[1]
        kept = path.read_text(encoding="utf-8").replace(",", "")
        numbers = re.findall(r"\d+(?:\.\d+)?", found.replace(",", ""))
        assert numbers, found
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", kept), f"{number} is not in {path}"
