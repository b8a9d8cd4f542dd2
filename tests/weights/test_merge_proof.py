"""A merge tries every changed tensor while it is made, and finds what is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_merge import CONFIGS, MODELS, adapted
from tiny import tiny_gpt2, tiny_llama
from weight_helpers import save_base, tiny_qwen3_moe

import lowrank
from lowrank import LoraConfig
from lowrank.adapters.methods.lora import Lora
from lowrank.errors import JobError
from lowrank.ops.low_rank import LowRank
from lowrank.weights import merge_checkpoint
from lowrank.weights.merging import blocks, updates
from lowrank.weights.merging import merge_checkpoint as merge_module
from lowrank.weights.merging import shard_writer as stream

EXPERTS = LoraConfig(
    r=2,
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    init_lora_weights=False,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_no_rounding_is_taken_for_a_fault(dtype: str, rounding: Any, tmp_path: Path) -> None:
    base = save_base(tiny_llama().to(getattr(torch, dtype)), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS["dora"], tmp_path)
    report = merge_checkpoint(base, adapter, tmp_path / "merged", rounding=rounding)
    assert report.proof is not None
    assert report.proof.tensors == report.changed == 14


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_nor_any_size(size: float, tmp_path: Path) -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    base = save_base(model, tmp_path / "base")
    adapter, _ = adapted(base, LoraConfig(r=4, target_modules=["c_attn", "wte"], init_lora_weights=False), tmp_path)
    assert merge_checkpoint(base, adapter, tmp_path / "merged").proof is not None


def other_scale(weight: torch.Tensor, term: LowRank, out: torch.Tensor | None = None) -> torch.Tensor:
    return MERGED(weight, replace(term, scale=term.scale * 1.01), out)


def transposed(weight: torch.Tensor, term: LowRank, out: torch.Tensor | None = None) -> torch.Tensor:
    square = weight.shape[0] == weight.shape[1]
    return MERGED(weight, replace(term, A=term.B.T, B=term.A.T) if square else term, out)


def nothing(weight: torch.Tensor, term: LowRank, out: torch.Tensor | None = None) -> torch.Tensor:
    return weight


def no_gain(weight: torch.Tensor, term: LowRank, out: torch.Tensor | None = None) -> torch.Tensor:
    return MERGED(weight, replace(term, gain=None), out)


MERGED = updates.merged_weight


@pytest.mark.parametrize("fault", [other_scale, transposed, nothing])
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "lora"), ("gpt2", "rslora"), ("llama", "dora"), ("phi3", "adalora")]
)
def test_a_wrong_sum(fault: Callable, name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(MODELS[name]().bfloat16(), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS[method], tmp_path)
    monkeypatch.setattr(updates, "merged_weight", fault)
    with pytest.raises(JobError, match="failed its check: its product with a random vector"):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_checkpoint(base, adapter, tmp_path / "merged", verify=False)


def test_a_magnitude_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_gpt2(), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS["dora"], tmp_path)
    monkeypatch.setattr(updates, "merged_weight", no_gain)
    with pytest.raises(JobError, match="failed its check"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("fault", [other_scale, nothing])
def test_experts(fault: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_qwen3_moe(), tmp_path / "base")
    adapter, _ = adapted(base, EXPERTS, tmp_path)
    assert merge_checkpoint(base, adapter, tmp_path / "merged").proof is not None
    monkeypatch.setattr(updates.ExpertsUpdate, "of_expert", lambda self, expert: WrongExpert(self, expert))
    with pytest.raises(NotImplementedError, match="needs its promise"):
        merge_checkpoint(base, adapter, tmp_path / "wrong")
    monkeypatch.undo()
    monkeypatch.setattr(updates, "merged_weight", fault)
    with pytest.raises(JobError, match="failed its check"):
        merge_checkpoint(base, adapter, tmp_path / "wrong")


class WrongExpert:
    """An update that nobody has said the effect of."""

    def __init__(self, update: updates.ExpertsUpdate, expert: int) -> None:
        self.splits = self.stacked = self.low_rank = True
        self.shape = self.before_tie = None
        self.steps = (self,)

    def apply(self, block: torch.Tensor, first: int) -> None:
        pass


def test_a_scale_read_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS["lora"], tmp_path)
    read = Lora.scale
    monkeypatch.setattr(Lora, "scale", lambda self, config, path: read(self, config, path) / 2)
    with pytest.raises(JobError, match="failed its check"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("lost", ["update", "change"])
def test_a_tensor_that_was_skipped(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS["lora"], tmp_path)
    find, plan = merge_module.find_updates, merge_module.make_plan
    name = "model.layers.1.mlp.up_proj.weight"

    def without(found: dict) -> dict:
        return {key: update for key, update in found.items() if key != name}

    if lost == "update":
        monkeypatch.setattr(merge_module, "find_updates", lambda *given: without(find(*given)))
    else:
        monkeypatch.setattr(merge_module, "make_plan", lambda base, found, *more: plan(base, without(found), *more))
    with pytest.raises(JobError, match="13 were merged" if lost == "update" else "left out model.layers.1.mlp.up_proj"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_a_tensor_in_anothers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_llama(), tmp_path / "base", max_shard_size="100KB")
    assert json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    adapter, _ = adapted(base, CONFIGS["lora"], tmp_path)
    place = stream.encode_header

    def swapped(tensors: Any, metadata: Any) -> Any:
        header, places = place(tensors, metadata)
        q, o = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
        if q in places and o in places:
            places[q], places[o] = places[o], places[q]
        return header, places

    monkeypatch.setattr(stream, "encode_header", swapped)
    with pytest.raises(JobError, match="holds something else under that name"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_a_tensor_made_from_anothers_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong file of the base, or the wrong place in it."""
    base = save_base(tiny_llama(), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS["lora"], tmp_path)
    plan = merge_module.make_plan

    def crossed(*given: Any) -> Any:
        made = plan(*given)
        (shard,) = made.shards.values()
        names = [tensor.name for tensor in shard]
        q, o = (names.index(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qo")
        shard[q] = replace(shard[q], source=shard[o].source)
        return made

    monkeypatch.setattr(merge_module, "make_plan", crossed)
    with pytest.raises(JobError, match="made from another tensor of the base"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_values_that_are_rounded_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_llama().bfloat16(), tmp_path / "base")
    adapter, _ = adapted(base, CONFIGS["lora"], tmp_path)
    rounded = blocks.round_into

    def coarse(out: torch.Tensor, exact: torch.Tensor, how: Any, seed: int) -> torch.Tensor:
        return rounded(out, exact.to(torch.float8_e4m3fn).to(exact.dtype), how, seed)

    monkeypatch.setattr(blocks, "round_into", coarse)
    with pytest.raises(JobError, match="rounding to BF16 does not explain"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_what_is_saved_whole_and_single_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["norm"],
        trainable_token_indices=[3, 5],
        init_lora_weights=False,
    )
    adapter, _ = adapted(base, config, tmp_path)
    report = merge_checkpoint(base, adapter, tmp_path / "merged")
    assert report.proof is not None
    assert report.proof.tensors == report.changed
    apply = updates.RowReplacement.apply

    def next_row(self: updates.RowReplacement, block: torch.Tensor, first: int) -> None:
        apply(self, block, first - 1)

    monkeypatch.setattr(updates.RowReplacement, "apply", next_row)
    with pytest.raises(JobError, match=r"embed_tokens\.weight failed its check"):
        merge_checkpoint(base, adapter, tmp_path / "wrong")
    assert load_file(tmp_path / "merged" / "model.safetensors")
    assert lowrank.load(tiny_llama(tie_word_embeddings=True), adapter)
