"""What the documents show is run."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

import lowrank
from lowrank.adapters import METHODS, register_kind
from lowrank.adapters.registry import KINDS
from lowrank.errors import InputError

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_method_that_contributing_adds():
    scope = executed()
    try:
        model = lowrank.wrap(tiny_llama(), scope["LoraFaConfig"](r=4))
        model(torch.arange(3, 9)[None]).logits.sum().backward()
        layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
        assert type(layer) is scope["LoraFaLayer"]
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad is not None
    finally:
        METHODS.pop("lora_fa", None)
        KINDS.pop(0)


def test_the_kind_of_module_that_contributing_adds(tmp_path):
    scope = executed()
    try:
        base = scope["InOutLinear"](6, 5)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), copy.deepcopy(base))
        config = lowrank.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        lowrank.wrap(model, config)
        assert lowrank.describe(model)["default"].modules == ("0", "1")
        layer = model[1].adapters["default"]
        x = torch.randn(3, 4)
        h = torch.nn.functional.linear(x, merged_by_hand(model[0]), model[0].bias)
        expected = h @ (base.weight + layer.scale * (layer.lora_B @ layer.lora_A).T)
        torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
        assert layer.lora_A.grad.any()
        lowrank.save(model, tmp_path / "adapter")
        other = torch.nn.Sequential(copy.deepcopy(torch.nn.Linear(4, 6)), copy.deepcopy(base))
        other[0].load_state_dict({key: model[0].state_dict()[key] for key in ("weight", "bias")})
        torch.testing.assert_close(lowrank.load(other, tmp_path / "adapter")(x), expected)
        torch.testing.assert_close(lowrank.merge(model)(x), expected)
        assert type(model[1]) is scope["InOutLinear"]
    finally:
        METHODS.pop("lora_fa", None)
        KINDS.pop(0)


def test_half_a_kind_is_refused():
    with pytest.raises(InputError, match=r"int is no kind of module: it lacks delta, fits, "):
        register_kind(3)


def executed() -> dict:
    """What the examples of CONTRIBUTING define and register."""
    scope: dict = {}
    for block in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        exec(block, scope)
    return scope


def merged_by_hand(linear: torch.nn.Linear) -> torch.Tensor:
    layer = linear.adapters["default"]
    return linear.weight + layer.scale * layer.lora_B @ layer.lora_A


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
