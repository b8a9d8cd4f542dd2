"""Adapter folders between peft and lowrank, every architecture and method: unmerged, merged, reloaded."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import MODELS, output
from tiny import tiny_llama
from weight_helpers import randomise

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters import RankBudget

METHODS = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 3},
}
IDS = torch.arange(3, 15).view(2, 6)


def same(got: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    """To `atol` of the largest value."""
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, atol=atol, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_folder_goes_to_peft_and_back(name: str, method: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    config = (AdaLoraConfig if method == "adalora" else LoraConfig)(**METHODS[method])
    ours = lowrank.wrap(copy.deepcopy(base), config)
    randomise(ours, 0.1)
    expected = output(ours, name)
    assert not torch.allclose(expected, output(base, name), atol=1e-3)
    lowrank.save(ours, tmp_path / "ours")

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    same(output(theirs, name), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    same(output(back, name), expected)

    same(output(theirs.merge_and_unload(), name), expected, 2e-5)
    merged = lowrank.merge(back)
    merged.save_pretrained(tmp_path / "merged")
    same(output(type(base).from_pretrained(tmp_path / "merged").eval(), name), expected, 2e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_single_tokens_both_ways(tied: bool, tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=tied)
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 9]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS).logits
    ours = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    same(ours(IDS).logits, expected)
    assert not torch.allclose(expected, base(IDS).logits, atol=1e-3)
    lowrank.save(ours, tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()(IDS).logits, expected)


CLASSIFIERS = {
    "SEQ_CLS": transformers.BertForSequenceClassification,
    "TOKEN_CLS": transformers.BertForTokenClassification,
    "QUESTION_ANS": transformers.BertForQuestionAnswering,
}


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_a_classifiers_head_both_ways(task: str, tmp_path: Path) -> None:
    """peft saves its head whole without being asked, under two names of which a model has one."""
    torch.manual_seed(0)
    base = CLASSIFIERS[task](MODELS["bert"]().config).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type=task, r=4)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    same(ours(IDS)[0], theirs(IDS)[0])
    assert not torch.allclose(ours(IDS)[0], base(IDS)[0], atol=1e-3)
    lowrank.save(ours, tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()(IDS)[0], ours(IDS)[0])


def trained(model: torch.nn.Module, after_step, steps: int = 6) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(1, steps + 1):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
    model.eval()


ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "lora_alpha": 4}


def test_an_adalora_that_peft_has_pruned(tmp_path: Path) -> None:
    base = tiny_llama()
    fields = {"task_type": "CAUSAL_LM", "total_step": 6, "target_modules": ["q_proj", "up_proj"], **ADALORA}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**fields))
    trained(theirs, theirs.base_model.update_and_allocate)
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    ours = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    assert sum(map(sum, lowrank.describe(ours)["default"].config.rank_pattern.values())) == 2 * 4
    same(ours(IDS).logits, read(IDS).logits)
    lowrank.save(ours, tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()(IDS).logits, read(IDS).logits)


@pytest.mark.parametrize("steps", [0, 6])
def test_peft_reads_an_adalora_whose_config_did_not_say_how_long_it_would_train(steps: int, tmp_path: Path) -> None:
    base = tiny_llama()
    ours = lowrank.wrap(copy.deepcopy(base), AdaLoraConfig(init_lora_weights=False, **ADALORA))
    if steps:
        trained(ours, RankBudget(ours, "default", steps).step)
        assert lowrank.describe(ours)["default"].config.total_step == steps
    lowrank.save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    same(theirs(IDS).logits, ours(IDS).logits)
    same(lowrank.load(base, tmp_path / "ours")(IDS).logits, ours(IDS).logits)
