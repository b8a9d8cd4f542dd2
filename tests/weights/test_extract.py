"""A LoRA from the difference of two checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny import build, tiny_gpt2, tiny_llama
from weight_helpers import logits, randomise, reload, save_base, tiny_qwen3_moe, with_peft

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError, JobError
from lowrank.weights import extract, merge_checkpoint
from lowrank.weights.arithmetic import carriers
from lowrank.weights.arithmetic.approximate import leading
from lowrank.weights.arithmetic.factors import Product


def full_tuned(make, folder: Path, scale: float = 0.02, only: str = "") -> tuple[Path, Path]:
    """A model, and the same with noise on every parameter (or on those whose name has `only` in it)."""
    base = save_base(make(), folder / "base")
    model = reload(base)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale
    return base, save_base(model, folder / "tuned")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_at_full_rank_it_gives_the_tuned_model_back(make, tmp_path: Path) -> None:
    base, tuned = full_tuned(make, tmp_path)
    report = extract(base, tuned, r=320, out=tmp_path / "adapter")
    assert min(report.kept.values()) > 1 - 1e-6
    wanted = logits(reload(tuned))
    assert not torch.allclose(logits(reload(base)), wanted, atol=1e-2)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "adapter")), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(with_peft(base, tmp_path / "adapter"), wanted, atol=1e-4, rtol=0)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)


def test_what_a_lora_did_is_found_again(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    model = lowrank.wrap(reload(base), LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    randomise(model)
    wanted = logits(model)
    tuned = save_base(lowrank.merge(model), tmp_path / "tuned")
    report = extract(base, tuned, out=tmp_path / "adapter", energy=0.99999)
    assert report.ranks.keys() == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert set(report.ranks.values()) == {3}
    assert report.kept_of_all > 0.99999
    assert not report.whole
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "adapter")), wanted, atol=1e-4, rtol=0)


def test_ranks_are_chosen_by_energy(tmp_path: Path) -> None:
    base, tuned = full_tuned(tiny_llama, tmp_path, only="proj")
    report = extract(base, tuned, out=tmp_path / "adapter", energy=0.8)
    exact = reload(tuned).state_dict()
    before = reload(base).state_dict()
    for path, rank in report.ranks.items():
        values = torch.linalg.svdvals(exact[f"{path}.weight"] - before[f"{path}.weight"]).square()
        share = values.cumsum(0) / values.sum()
        assert rank == int((share < 0.8).sum()) + 1
        assert report.kept[path] == pytest.approx(share[rank - 1].item(), abs=1e-4)
    assert len(set(report.ranks.values())) > 1
    assert logits(lowrank.load(reload(base), tmp_path / "adapter")).isfinite().all()


@pytest.mark.parametrize(("rank", "energy"), [(8, None), (None, 0.6), (20, 0.99)])
def test_random_projections_come_near_the_exact_decomposition(rank: int | None, energy: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 301).float().pow(-1.0)
    left, right = (torch.linalg.qr(torch.randn(n, 300, generator=generator)).Q for n in (400, 500))
    matrix = (left * decay) @ right.T
    product, kept = leading(matrix, rank, energy, seed=1)
    shares = decay.square().cumsum(0) / decay.square().sum()
    if energy is not None and rank is None:
        assert product.rank == int((shares < energy).sum()) + 1
    assert kept == pytest.approx(shares[product.rank - 1].item(), abs=2e-3)
    error = torch.linalg.vector_norm(product.B @ product.A - matrix).square() / matrix.square().sum()
    assert error.item() == pytest.approx(1 - kept, abs=1e-4)


def test_models_that_cannot_be_compared(tmp_path: Path) -> None:
    base, tuned = full_tuned(tiny_llama, tmp_path, only="q_proj")
    with pytest.raises(InputError, match="do not differ"):
        extract(base, base, r=2, out=tmp_path / "adapter")
    wide = save_base(tiny_llama(intermediate_size=64), tmp_path / "wide")
    with pytest.raises(InputError, match="differ in shape: model"):
        extract(base, wide, r=2, out=tmp_path / "adapter")
    deep = save_base(tiny_llama(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(InputError, match=r"only one of the models has model\.layers\.2"):
        extract(base, deep, r=2, out=tmp_path / "adapter")
    for arguments, why in (({}, "neither"), ({"r": 0}, "at least 1"), ({"energy": 1.5}, "at most 1")):
        with pytest.raises(InputError, match=why):
            extract(base, tuned, out=tmp_path / "adapter", **arguments)
    with pytest.raises(InputError, match="lie in one another"):
        extract(base, tuned, r=2, out=base / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("make", "name"), [(tiny_llama, "q_proj"), (tiny_llama, "norm"), (tiny_qwen3_moe, "gate_up")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(make, name: str, value: float, tmp_path: Path) -> None:
    base = save_base(make(), tmp_path / "base")
    model = reload(base)
    next(p for key, p in model.named_parameters() if name in key).data.view(-1)[3] = value
    tuned = save_base(model, tmp_path / "tuned")
    with pytest.raises(InputError, match=f"{name}.*holds NaN or infinity"):
        extract(base, tuned, r=2, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_files_in_different_dtypes(tmp_path: Path) -> None:
    """What is the same but for the dtype does not differ."""
    base = save_base(tiny_llama().bfloat16(), tmp_path / "base")
    model = reload(base).float()
    model.model.layers[1].mlp.up_proj.weight.data += 0.01
    tuned = save_base(model, tmp_path / "tuned")
    report = extract(base, tuned, r=1, out=tmp_path / "adapter")
    assert report.ranks == {"model.layers.1.mlp.up_proj": 1}
    assert not report.whole


@pytest.mark.parametrize(("rank", "energy"), [(32, None), (None, 1.0)])
def test_experts(rank: int | None, energy: float | None, tmp_path: Path) -> None:
    base, tuned = full_tuned(tiny_qwen3_moe, tmp_path, scale=0.1, only="layers.1.mlp.experts")
    report = extract(base, tuned, r=rank, energy=energy, out=tmp_path / "adapter")
    assert report.ranks.keys() == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    wanted = logits(reload(tuned))
    assert not torch.allclose(logits(reload(base)), wanted, atol=1e-3)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "adapter")), wanted, atol=1e-4, rtol=0)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def tiny_deepseek():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    routed = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = transformers.DeepseekV3Config(
        **SIZES, **latent, **routed, num_attention_heads=4, first_k_dense_replace=1, moe_intermediate_size=16
    )
    return build(config)


def tiny_jamba():
    mamba = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return build(transformers.JambaConfig(**SIZES, **HEADS, **mamba, **layers, num_experts=4, num_experts_per_tok=2))


def tiny_gpt_oss():
    return build(transformers.GptOssConfig(**SIZES, **HEADS, head_dim=8, num_local_experts=4, num_experts_per_tok=2))


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


def tiny_vit():
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**VISION, image_size=16, patch_size=8)).eval()


def tiny_resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config).eval()


def tiny_bert():
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**VISION, vocab_size=96)).eval()


def tiny_mobilebert():
    """Its head reads the weights of `decoder`, which is tied to the embedding, and of `dense`; it calls neither."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "intra_bottleneck_size": 16, "num_feedforward_networks": 1, "vocab_size": 32}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**sizes, **shape)).eval()


def output(model) -> torch.Tensor:
    ids = torch.arange(3, 15).view(2, 6)
    inputs = {"input_ids": ids}
    if hasattr(model.config, "num_channels"):
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        out = model.eval()(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def changed(make, name: str, folder: Path) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    """A base, the same with one tensor changed, and what both answer."""
    model = make()
    model.save_pretrained(folder / "base")
    before = output(model)
    tensor = model.state_dict()[name]
    tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).abs() * 0.3
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", before, output(model)


@pytest.mark.parametrize(
    ("make", "name", "whole"),
    [
        (tiny_llama, "model.norm.weight", "model.norm"),
        (tiny_deepseek, "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate"),
        (tiny_deepseek, "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.gate"),
        (tiny_deepseek, "model.layers.1.mlp.experts.down_proj", None),
        (tiny_jamba, "model.layers.0.mamba.D", "model.layers.0.mamba"),
        (tiny_jamba, "model.layers.0.mamba.conv1d.weight", "model.layers.0.mamba"),
        (tiny_jamba, "model.layers.1.feed_forward.router.weight", "model.layers.1.feed_forward.router"),
        (tiny_gpt_oss, "model.layers.0.self_attn.sinks", "model.layers.0.self_attn"),
        (tiny_gpt_oss, "model.layers.0.self_attn.q_proj.bias", None),
        (tiny_gpt_oss, "model.layers.1.mlp.experts.gate_up_proj", None),
        (tiny_gpt_oss, "model.layers.1.mlp.experts.down_proj_bias", "model.layers.1.mlp.experts"),
        (tiny_t5, "shared.weight", None),
        (tiny_t5, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", None),
        (tiny_vit, "embeddings.cls_token", "embeddings"),
        (tiny_vit, "embeddings.position_embeddings", "embeddings"),
        (tiny_vit, "embeddings.patch_embeddings.projection.weight", None),
        (tiny_resnet, "resnet.embedder.embedder.normalization.running_var", "resnet.embedder.embedder.normalization"),
        (tiny_bert, "cls.predictions.bias", None),
        (tiny_bert, "bert.embeddings.word_embeddings.weight", None),
        (tiny_mobilebert, "mobilebert.embeddings.word_embeddings.weight", "cls.predictions"),
        (tiny_mobilebert, "cls.predictions.bias", "cls.predictions"),
        (tiny_mobilebert, "cls.predictions.dense.weight", "cls.predictions"),
        (tiny_mobilebert, "cls.predictions.transform.dense.weight", None),
    ],
)
def test_whatever_differs_is_carried_and_acts(make, name: str, whole: str | None, tmp_path: Path) -> None:
    base, tuned, before, wanted = changed(make, name, tmp_path)
    assert not torch.allclose(before, wanted, atol=1e-4)
    report = extract(base, tuned, r=96, out=tmp_path / "adapter")
    assert report.whole == ([] if whole is None else [whole])
    assert report.proved >= 1
    loaded = lowrank.load(type(make()).from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(output(loaded), wanted, atol=1e-4, rtol=0)
    if make is tiny_mobilebert:
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
        torch.testing.assert_close(output(make().from_pretrained(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [tiny_mobilebert, tiny_bert])
def test_a_whole_head_with_the_vocabularys_matrix_inside_loads_again(make, tmp_path: Path) -> None:
    """The matrix in the file is the copy's, and may differ from the base's."""
    model = lowrank.wrap(make(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["cls.predictions"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    assert not torch.allclose(output(model), output(make()), atol=1e-2)
    folder = lowrank.save(model, tmp_path / "adapter")
    torch.testing.assert_close(output(lowrank.load(make(), folder)), output(model), atol=1e-5, rtol=0)


def test_what_no_adapter_holds_is_refused_by_name(tmp_path: Path) -> None:
    """A buffer of the whole model: no module smaller than that is called and holds it."""
    sizes = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.BartConfig(**sizes, encoder_attention_heads=4, decoder_attention_heads=4)
    base, tuned, _, _ = changed(
        lambda: transformers.BartForConditionalGeneration(config).eval(), "final_logits_bias", tmp_path
    )
    with pytest.raises(InputError, match="final_logits_bias differs, and neither"):
        extract(base, tuned, r=4, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_biases_beside_experts_with_biases(tmp_path: Path) -> None:
    """A file has no place for single biases there; their modules go whole."""
    model = tiny_gpt_oss()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj += 0.05
        model.model.layers[1].self_attn.o_proj.bias += 0.2
        model.model.layers[1].self_attn.o_proj.weight += 0.02
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", r=2, out=tmp_path / "adapter")
    assert report.whole == ["model.layers.1.self_attn.o_proj"]
    assert report.ranks.keys() == {"model.layers.0.mlp.experts.down_proj"}
    loaded = lowrank.load(reload(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(output(loaded), output(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_was_untied(tied: bool, tmp_path: Path) -> None:
    """In tuning, or the other way round."""
    base = save_base(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    model = tiny_llama(tie_word_embeddings=not tied)
    model.load_state_dict(reload(base).state_dict())
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.randn(320, 32, generator=torch.Generator().manual_seed(1)) * 0.1
        model.lm_head.weight += 0.05 if tied else 0.0
    tuned = save_base(model, tmp_path / "tuned")
    report = extract(base, tuned, r=32, out=tmp_path / "adapter")
    assert report.ranks.keys() == {"lm_head", "model.embed_tokens"}
    loaded = lowrank.load(reload(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_were_added(tied: bool, tmp_path: Path) -> None:
    base = save_base(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    model = reload(base)
    model.resize_token_embeddings(325)
    with torch.no_grad():
        model.model.embed_tokens.weight[318:] += 0.3
        model.model.layers[0].self_attn.q_proj.weight += 0.02
    tuned = save_base(model, tmp_path / "tuned")
    report = extract(base, tuned, r=2, out=tmp_path / "adapter")
    assert sorted(report.whole) == ["lm_head", "model.embed_tokens"]
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    wanted = logits(model)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert reload(tmp_path / "merged").config.vocab_size == 325
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)
    fresh = reload(base)
    fresh.resize_token_embeddings(325)
    torch.testing.assert_close(logits(lowrank.load(fresh, tmp_path / "adapter")), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fault", ["scaled", "transposed", "left out"])
def test_the_proof_finds_a_fault(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = full_tuned(tiny_llama, tmp_path, only="q_proj")
    put = carriers.Carriers._put

    def faulty(self, path: str, product) -> None:
        if "layers.1" in path and fault == "left out":
            del self.ranks[path]
        elif "layers.1" in path:
            put(self, path, product.times(1.05) if fault == "scaled" else Product(product.B.T, product.A.T))
        else:
            put(self, path, product)

    monkeypatch.setattr(carriers.Carriers, "_put", faulty)
    with pytest.raises(JobError, match=r"layers\.1\.self_attn\.q_proj"):
        extract(base, tuned, r=8, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
