"""The registry: every quantiser has all that is asked of one, and is found by its name and its layers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from lowrank.models import load_model
from lowrank.ops.parts import parts_of
from lowrank.quantisers.quantiser import Quantiser
from lowrank.quantisers.registry import (
    QUANTISERS,
    loading_config,
    parameter_count,
    quantiser_named,
    quantiser_of,
    quantisers,
    schemes,
)

ASKED = {*Quantiser.__annotations__, *(name for name in vars(Quantiser) if not name.startswith("_"))}


@pytest.mark.parametrize("quantiser", quantisers(), ids=lambda quantiser: quantiser.name)
def test_it_has_all_that_is_asked(quantiser):
    assert [name for name in ASKED if not hasattr(quantiser, name)] == []
    assert quantiser_named(quantiser.name) is quantiser
    assert quantiser.name in quantiser.offer


def test_the_names_are_those_of_the_files():
    assert [quantiser.name for quantiser in quantisers()] == list(QUANTISERS)


def test_no_scheme_has_two_meanings():
    assert len(schemes()) == 1 + sum(len(quantiser.schemes) for quantiser in quantisers())


def test_names_are_there_without_torch():
    code = "import sys; from lowrank.quantisers.registry import QUANTISERS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("scheme", sorted(schemes().keys() - {"none"}))
def test_every_scheme_loads_and_is_known_again(scheme, tmp_path):
    dense = tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    options = schemes()[scheme]
    assert loading_config(options).quant_method == options["quant_method"]
    model = load_model(str(tmp_path), quantization=options, device="cpu")
    linear = [module for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    assert {quantiser_of(module).name for module in linear} == {options["quant_method"]}
    assert quantiser_of(model.lm_head) is None
    for module in linear:
        quantiser = quantiser_of(module)
        assert quantiser.bits(module) == (4 if "4" in scheme else 8)
        assert quantiser.weight(module).shape == (module.out_features, module.in_features)
    assert parameter_count(model) == parameter_count(dense) == sum(p.numel() for p in dense.parameters())
    held, before = (sum(part.nbytes for p in each.parameters() for part in parts_of(p)) for each in (model, dense))
    assert held < 0.8 * before
