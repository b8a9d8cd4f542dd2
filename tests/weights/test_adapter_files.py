"""What an adapter's file holds is checked before it is used: sizes, ranks, halves; layouts go by who wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from weight_helpers import edit_json, logits, randomise, reload, tiny_qwen3_moe

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint

Tensors = dict[str, torch.Tensor]
A, B = "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"


def change(adapter: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(file).items()}
    changed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in edit(tensors).items()}
    save_file(changed, file, {"format": "pt"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_llama(num_hidden_layers=2).save_pretrained(folder)
    return folder


def saved(base: Path, config: LoraConfig | AdaLoraConfig, folder: Path) -> Path:
    model = lowrank.wrap(reload(base), config)
    randomise(model)
    return lowrank.save(model, folder)


DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "empty": (lambda t: {name: torch.zeros(0) for name in t}, "q_proj.lora_A.weight"),
    "empty ranks": (lambda t: {n: v[:0] if "lora_A" in n else v[:, :0] for n, v in t.items()}, "q_proj.lora_A.weight"),
    "one empty": (lambda t: t | {B: torch.zeros(0)}, B),
    "no dimension": (lambda t: t | {A: torch.tensor(1.0)}, A),
    "fewer ranks": (lambda t: {n: v[:2] if "lora_A" in n else v[:, :2] for n, v in t.items()}, A),
    "wide": (lambda t: t | {A: torch.cat([t[A], t[A]], dim=1)}, A),
    "turned": (lambda t: t | {A: t[A].t()}, A),
    "half": (lambda t: {n: v for n, v in t.items() if n != B}, "q_proj"),
    "neither half": (lambda t: {n: v for n, v in t.items() if n not in (A, B)}, r"layers\.0\.self_attn\.q_proj"),
    "another": (lambda t: t | {"model.norm.weight": torch.ones(32)}, "model.norm"),
    "another layer": (lambda t: t | {A.replace("0", "7"): t[A].clone(), B.replace("0", "7"): t[B].clone()}, "layers.7"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_what_does_not_go_together_is_refused_by_name(damage: str, method: str, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"])
    edit, named = DAMAGE[damage]
    if method == "adalora":
        config = AdaLoraConfig(init_r=8, target_r=8, total_step=10, target_modules=["q_proj"])
        named = named.replace(".weight", "")
    adapter = saved(base, config, tmp_path / "adapter")

    def with_peft_names(tensors: Tensors) -> Tensors:
        renamed = edit({f"{n}.weight" if n.endswith(("lora_A", "lora_B")) else n: v for n, v in tensors.items()})
        return {n.removesuffix(".weight") if "lora" in n else n: v for n, v in renamed.items()}

    change(adapter, edit if method == "lora" else with_peft_names)
    for verb in (
        lambda: lowrank.load(reload(base), adapter),
        lambda: merge_checkpoint(base, adapter, tmp_path / "merged"),
    ):
        with pytest.raises(InputError, match=named) as error:
            verb()
        assert str(adapter) in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_a_config_with_another_rank_is_refused(base: Path, tmp_path: Path) -> None:
    """The scale goes by the config's r: the adapter would be merged at a quarter of its effect."""
    adapter = saved(base, LoraConfig(r=8, target_modules=["q_proj"]), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", r=32)
    with pytest.raises(InputError, match=r"lora_A\.weight has rank 8, and the config gives \S+q_proj 32"):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    with pytest.raises(InputError, match=r"misshapen: \S+lora_A\.weight \[8, 32\] \(here \[32, 32\]\)"):
        lowrank.load(reload(base), adapter)


def old_layout(tensors: Tensors, experts: int) -> Tensors:
    """As peft wrote fused experts before 0.19, by its own formula then: ΔWₑ = einsum("o r e, e r i -> e i o", B, A)."""
    turned = {}
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        B_name = name.replace("lora_A", "lora_B")
        A, B = tensors[name], tensors[B_name]
        by_expert_A, by_expert_B = A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts)
        delta = torch.einsum("o r e, e r i -> e o i", by_expert_B, by_expert_A)
        old_A = by_expert_B.permute(2, 1, 0)
        old_B = by_expert_A.permute(2, 1, 0)
        torch.testing.assert_close(torch.einsum("o r e, e r i -> e i o", old_B, old_A), delta)
        turned |= {name: old_A.flatten(0, 1), B_name: old_B.flatten(1)}
    assert turned
    return tensors | turned


@pytest.mark.parametrize("square", [True, False])
def test_experts_of_peft_before_0_19(square: bool, tmp_path: Path) -> None:
    model = tiny_qwen3_moe(num_hidden_layers=1, moe_intermediate_size=32 if square else 16)
    model.save_pretrained(tmp_path / "base")
    stacks = ["experts.down_proj", "experts.gate_up_proj"]
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=stacks)
    wrapped = peft.get_peft_model(model, config)
    randomise(wrapped)
    wanted, adapter = logits(wrapped), tmp_path / "adapter"
    wrapped.save_pretrained(adapter)
    change(adapter, lambda tensors: old_layout(tensors, 4))
    for version in ("0.18.1", "0.17.0", None):
        edit_json(adapter / "adapter_config.json", peft_version=version)
        torch.testing.assert_close(logits(lowrank.load(reload(tmp_path / "base"), adapter)), wanted, atol=1e-5, rtol=0)
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / f"merged {version}")
        torch.testing.assert_close(logits(reload(tmp_path / f"merged {version}")), wanted, atol=1e-5, rtol=0)
    edit_json(adapter / "adapter_config.json", peft_version="0.19.0")
    with pytest.raises(InputError, match="misshapen"):  # gate_up_proj is not square
        lowrank.load(reload(tmp_path / "base"), adapter)


ONE_PLACE = {
    "one layer": LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "not one layer": LoraConfig(target_modules=["q_proj"], exclude_modules=r".*layers\.1.*"),
    "one module": LoraConfig(target_modules=["layers.1.mlp.up_proj"]),
    "by pattern": LoraConfig(target_modules=r".*layers\.0.*_proj"),
    "the head": LoraConfig(target_modules=["lm_head"]),
    "the embedding": LoraConfig(target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("place", ONE_PLACE)
def test_an_adapter_on_few_modules_loads_back_from_every_form(place: str, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, ONE_PLACE[place], tmp_path / "adapter")
    wanted = logits(lowrank.load(reload(base), adapter))
    assert not torch.allclose(wanted, logits(reload(base)), atol=2e-4)
    lowrank.weights.export(adapter, tmp_path / "vllm", to="vllm")
    lowrank.weights.export(adapter, tmp_path / "one.safetensors", to="safetensors")
    lowrank.weights.export(adapter, tmp_path / "llama", to="llama.cpp", base=base)
    for form in ("vllm", "one.safetensors", "llama"):
        torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / form)), wanted, atol=1e-5, rtol=0)
    merge_checkpoint(base, tmp_path / "vllm", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_of_git_lfs_is_told_as_that(tmp_path, name):
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=2))
    lowrank.save(model, tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(InputError, match=rf"{name}: the file is a Git LFS pointer.*\nFetch it: git -C .* lfs pull"):
        lowrank.load(tiny_llama(), tmp_path / "a")
