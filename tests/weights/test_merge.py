"""Merging on disk: the merged folder, loaded by transformers alone, answers as base and adapter do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import VOCAB, build, tiny_gpt2, tiny_llama, tiny_qwen2
from weight_helpers import IDS, edit_json, logits, peft_adapter, randomise, reload, save_base

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError, JobError
from lowrank.weights import merge_checkpoint
from lowrank.weights.merging import blocks
from lowrank.weights.merging import merge_checkpoint as merge_module
from lowrank.weights.merging import shard_writer as stream


def tiny_phi3():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return build(transformers.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


def tiny_neox():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return build(transformers.GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2, "phi3": tiny_phi3, "neox": tiny_neox}
CONFIGS = {
    "lora": LoraConfig(r=4, init_lora_weights=False),
    "rslora": LoraConfig(r=4, use_rslora=True, init_lora_weights=False),
    "dora": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "bias": LoraConfig(r=4, bias="all", init_lora_weights=False),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, init_lora_weights=False),
}


def merged(base: Path, adapter: Path, **kwargs: object):
    out = adapter.parent / "merged"
    report = merge_checkpoint(base, adapter, out, **kwargs)
    return reload(out), report


def adapted(base: Path, config: object, folder: Path) -> tuple[Path, torch.Tensor]:
    model = lowrank.wrap(reload(base), config)
    randomise(model)
    return lowrank.save(model, folder / "adapter"), logits(model)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_adapted(name: str, method: str, tmp_path: Path) -> None:
    base = save_base(MODELS[name](), tmp_path / "base")
    adapter, wanted = adapted(base, CONFIGS[method], tmp_path)
    assert not torch.allclose(logits(reload(base)), wanted, atol=1e-2)
    model, report = merged(base, adapter)
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=0)
    assert report.changed >= 8
    in_memory = lowrank.merge(lowrank.load(reload(base), adapter))
    torch.testing.assert_close(logits(model), logits(in_memory), atol=2e-5, rtol=0)


def test_merges_what_peft_saved_as_peft_does(tmp_path: Path) -> None:
    base = save_base(tiny_gpt2(), tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "wte"], init_lora_weights=False)
    wanted = peft_adapter(base, tmp_path / "adapter", config)
    model, report = merged(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=0)
    assert not model.config.tie_word_embeddings
    assert any("both are written" in note for note in report.notes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["lm_head"], init_lora_weights=False),
        LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
        LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
        LoraConfig(target_modules=["embed_tokens"], use_dora=True, init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[9, 3, 200]),
    ],
)
def test_heads_and_embeddings(config: LoraConfig, tied: bool, tmp_path: Path) -> None:
    base = save_base(tiny_qwen2(tie_word_embeddings=tied), tmp_path / "base")
    adapter, wanted = adapted(base, config, tmp_path)
    model, _ = merged(base, adapter)
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=0)
    rows_only = config.trainable_token_indices is not None
    assert model.config.tie_word_embeddings == (tied and rows_only)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not (tied and rows_only))


def test_a_classification_head(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    result = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(result), logits(wrapped), atol=2e-5, rtol=0)
    assert result.config.architectures == ["LlamaForSequenceClassification"]


def test_shards_and_everything_beside_them_arrive(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base", max_shard_size="40KB")
    (base / "NOTES.bin").write_text("not a part of it")
    adapter, wanted = adapted(base, LoraConfig(r=4, init_lora_weights=False), tmp_path)
    seen: list[tuple[int, int]] = []
    model, report = merged(base, adapter, progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=0)
    out = tmp_path / "merged"
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()} - {"NOTES.bin"}
    assert len(list(out.glob("model-*.safetensors"))) > 2
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    index, old = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (out, base))
    assert index["weight_map"] == old["weight_map"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.size, report.size)


def test_loads_where_lowrank_is_not_installed(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    adapter, _ = adapted(base, LoraConfig(r=4, init_lora_weights=False), tmp_path)
    merged(base, adapter)
    code = (
        "import sys, torch; sys.modules['lowrank'] = None; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]).apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "print(model(torch.tensor([[3, 40, 77]])).logits[0, -1].sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "merged"], capture_output=True, text=True, check=True)
    assert float(run.stdout.split()[-1]) == pytest.approx(logits_of_three(base, adapter), abs=1e-4)


def logits_of_three(base: Path, adapter: Path) -> float:
    model = lowrank.load(reload(base), adapter)
    with torch.no_grad():
        return model(IDS[:1, :3]).logits[0, -1].sum().item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_one_rounding_in_the_bases_dtype(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    base = save_base(tiny_llama().to(kind), tmp_path / "base")
    adapter, _ = adapted(base, LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False), tmp_path)
    merged(base, adapter)
    name = "model.layers.0.self_attn.q_proj"
    factors, before, after = (
        load_file(file)
        for file in (
            adapter / "adapter_model.safetensors",
            base / "model.safetensors",
            tmp_path / "merged" / "model.safetensors",
        )
    )
    A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = before[f"{name}.weight"].double() + 2.0 * (B @ A)
    assert after[f"{name}.weight"].dtype == kind
    tolerance = 1e-12 if dtype == "float64" else torch.finfo(kind).eps / 2 * 1.001
    torch.testing.assert_close(after[f"{name}.weight"].double(), exact, rtol=tolerance, atol=1e-7)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_into_another_dtype(tmp_path: Path) -> None:
    base = save_base(tiny_llama().bfloat16(), tmp_path / "base")
    adapter, _ = adapted(base, LoraConfig(r=4, init_lora_weights=False), tmp_path)
    model, report = merged(base, adapter, dtype="float32")
    assert model.dtype == torch.float32
    assert report.rounding_loss < 1e-5
    precise = lowrank.load(reload(base).float(), adapter)
    torch.testing.assert_close(logits(model), logits(precise), atol=2e-5, rtol=0)


def test_the_rounding_loss_is_the_one_that_there_is(tmp_path: Path) -> None:
    base = save_base(tiny_llama().bfloat16(), tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
    model = lowrank.wrap(reload(base), config)
    randomise(model, 5e-4)
    adapter = lowrank.save(model, tmp_path / "adapter")
    _, report = merged(base, adapter)
    merge_checkpoint(base, adapter, tmp_path / "exact", dtype="float32")
    folders = (tmp_path / "exact", tmp_path / "merged", base)
    exact, rounded, before = (load_file(folder / "model.safetensors") for folder in folders)
    names = [name for name in exact if "q_proj" in name or "down_proj" in name]
    error = sum((rounded[n].float() - exact[n]).square().sum().item() for n in names)
    effect = sum((exact[n] - before[n].float()).square().sum().item() for n in names)
    assert report.rounding_loss == pytest.approx((error / effect) ** 0.5, rel=1e-3)
    assert report.rounding_loss > 0.1
    assert any("float32" in note and "stochastic" in note for note in report.notes)


def test_stochastic_rounding_keeps_small_effects_on_average(tmp_path: Path) -> None:
    base = save_base(tiny_llama().bfloat16(), tmp_path / "base")
    model = lowrank.wrap(reload(base), LoraConfig(target_modules=["down_proj"], r=1, lora_alpha=1))
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(f"{name}.adapters.default")
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1e-5)
    adapter = lowrank.save(model, tmp_path / "adapter")
    effect = {}
    for how in ("nearest", "stochastic"):
        merge_checkpoint(base, adapter, tmp_path / how, rounding=how)
        after, before = (load_file(p / "model.safetensors")[f"{name}.weight"].float() for p in (tmp_path / how, base))
        effect[how] = (after - before).mean().item()
    assert effect["stochastic"] == pytest.approx(1e-5, rel=0.3)
    assert effect["nearest"] < 2e-6


def test_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    adapter, _ = adapted(base, LoraConfig(r=4, init_lora_weights=False), tmp_path)
    report = merge_checkpoint(base, adapter, tmp_path / "merged", verify="answers")
    assert report.verified is not None
    assert report.verified.prompts == 4
    assert report.verified.same_greedy == 1.0
    assert report.verified.logit_error < 1e-5
    assert report.verified.tokens > 100
    assert merge_checkpoint(base, adapter, tmp_path / "unverified", verify=False).proof is None
    monkeypatch.setattr(merge_module, "find_updates", lambda *_: {})
    monkeypatch.setattr(merge_module.Trial, "finish", lambda self: None)
    with pytest.raises(JobError, match="differ from base and adapter by 100% of the adapter's effect"):
        merge_checkpoint(base, adapter, tmp_path / "wrong", verify="answers")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(InputError, match="no verification 'all'"):
        merge_checkpoint(base, adapter, tmp_path / "wrong", verify="all")


@pytest.mark.parametrize("damage", [("tokenizer.json", "{"), ("chat_template.jinja", "{{ raise_exception('no') }}")])
def test_a_tokenizer_that_cannot_be_used(damage: tuple[str, str], tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    adapter, _ = adapted(base, LoraConfig(r=4), tmp_path)
    (base / damage[0]).write_text(damage[1])
    with pytest.raises(InputError, match=r"(?s)cannot be tokenised.*without comparing answers"):
        merge_checkpoint(base, adapter, tmp_path / "merged", verify="answers")
    assert not (tmp_path / "merged").exists()
    merge_checkpoint(base, adapter, tmp_path / "merged")


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter, _ = adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path)
    with pytest.raises(InputError, match=r"model\.norm\.weight gets values that F16 cannot hold"):
        merged(base, adapter, dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_a_rounding_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rounding 'up'; there are nearest, stochastic"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", rounding="up")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(tiny_llama(), tmp_path / "base")
    return base, adapted(base, LoraConfig(target_modules=["q_proj"], r=4), tmp_path)[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_base_is_found_in_the_adapters_config(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge_checkpoint(None, pair[1], tmp_path / "merged")
    assert report.base == pair[0]
    edit_json(pair[1] / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base model"):
        merge_checkpoint(None, pair[1], tmp_path / "again")
    with pytest.raises(InputError, match="there is no model 'nobody/nothing'"):
        merge_checkpoint("nobody/nothing", pair[1], tmp_path / "again")


def test_outputs_that_would_destroy_something(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    before = tree(tmp_path)
    for out, why in [
        (base, "not empty"),
        (adapter, "not empty"),
        (base / "merged", "lie in one another"),
        (adapter / "x" / "y", "lie in one another"),
        (base / "config.json", "not a folder"),
    ]:
        with pytest.raises(InputError, match=why):
            merge_checkpoint(base, adapter, out)
    assert tree(tmp_path) == before


def test_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_base(tiny_llama(num_hidden_layers=3), tmp_path / "other")
    with pytest.raises(InputError, match=r"layers 2 \(here 3\)"):
        merge_checkpoint(other, pair[1], tmp_path / "merged")
    tensors = load_file(pair[1] / "adapter_model.safetensors")
    save_file(tensors, pair[1] / "adapter_model.safetensors")  # as other tools write it: no fingerprint
    wide = save_base(tiny_llama(hidden_size=64), tmp_path / "wide")
    with pytest.raises(InputError, match=r"q_proj has W \(64, 64\), which does not go with \S+lora_A.weight \[4, 32\]"):
        merge_checkpoint(wide, pair[1], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(JobError, match="disk is full"):
            merge_checkpoint(*pair, tmp_path / "merged")
    assert tree(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(JobError, match="GiB are needed"):
            merge_checkpoint(*pair, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_interrupted_and_killed_runs_can_be_run_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(*pair, tmp_path / "merged", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    leftover = tmp_path / ".merged.incomplete-killed"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    merge_checkpoint(*pair, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_blocks_are_the_same_as_the_whole(make, method: str, tmp_path: Path, monkeypatch) -> None:
    """DoRA's gain on a transposed weight (GPT-2) needs all of it; that is read and written in parts."""
    base = save_base(make(), tmp_path / "base")
    pair = base, adapted(base, CONFIGS[method], tmp_path)[0]
    merge_checkpoint(*pair, tmp_path / "whole", dtype="bfloat16", rounding="nearest")
    monkeypatch.setattr(blocks, "BLOCK", 100)
    monkeypatch.setattr(stream, "COPY", 1000)
    merge_checkpoint(*pair, tmp_path / "blocks", dtype="bfloat16", rounding="nearest")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for name, tensor in whole.items():  # sums of other lengths may fall on the other side of a rounding step
        torch.testing.assert_close(parts[name], tensor, rtol=2**-7, atol=0)
        assert (parts[name] != tensor).float().mean() < 0.01
