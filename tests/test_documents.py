"""What the documents show is run."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

import lowrank
from lowrank.adapters import METHODS, register_kind
from lowrank.adapters.kinds.known import KINDS
from lowrank.errors import InputError
from lowrank.recipes.info import show_info
from lowrank.weights.adapter_info import summarise

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def scope() -> Iterator[dict]:
    """What the examples of CONTRIBUTING define and register."""
    made: dict = {}
    kinds, methods = list(KINDS), dict(METHODS)
    for block in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        exec(block, made)
    yield made
    KINDS[:] = kinds
    METHODS.clear()
    METHODS.update(methods)


@pytest.fixture
def trained(scope, tmp_path) -> tuple[Path, Path]:
    """A run with the method that CONTRIBUTING adds: its base and its adapter."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the old tree", "completion": "sings of the river"}\n' * 8)
    sections = {
        "model": {"name_or_path": str(tmp_path / "base"), "device": "cpu"},
        "adapter": {"method": "lora_fa", "r": 4, "lora_alpha": 32},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 3, "learning_rate": 0.02, "report_to": "none"},
    }
    result = lowrank.train(sections)
    return tmp_path / "base", result.output_dir


def test_the_method_that_contributing_adds_trains_from_a_config(scope, trained):
    base, adapter = trained
    model = lowrank.load(AutoModelForCausalLM.from_pretrained(base), adapter, trainable=True)
    layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert type(lowrank.describe(model)["default"].config) is scope["LoraFaConfig"]
    assert type(layer.method) is scope["LoraFa"]
    assert layer.lora_B.any()
    torch.manual_seed(42)
    model(torch.arange(3, 9)[None]).logits.sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad.any()


def test_its_folder_is_a_lora_to_peft_and_merges_on_disk(trained, tmp_path):
    base, adapter = trained
    x = torch.arange(3, 9)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)(x).logits
    wanted = lowrank.load(AutoModelForCausalLM.from_pretrained(base), adapter)(x).logits
    assert (wanted - plain).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert type(theirs.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(theirs(x).logits, wanted, atol=1e-5, rtol=1e-5)
    lowrank.merge_checkpoint(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(x).logits, wanted, atol=1e-5, rtol=1e-5)


def test_info_shows_it_as_itself_and_as_a_lora_where_it_is_not_known(trained, capsys):
    _, adapter = trained
    show_info(adapter)
    assert "lora_fa, lora_alpha 32" in capsys.readouterr().out
    METHODS.pop("lora_fa")
    assert summarise(adapter).config.method_name == "lora"


def test_the_kind_of_module_that_contributing_adds(scope, tmp_path):
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


def test_half_a_kind_is_refused():
    with pytest.raises(InputError, match=r"int is no kind of module: it lacks delta, fits, "):
        register_kind(3)


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
