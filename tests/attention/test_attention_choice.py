"""`set_attention`: what is chosen, what is refused and how, and that the model really changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
import transformers
import zoo
from transformers import modeling_flash_attention_utils as theirs

from lowrank.attention import BACKENDS, check_packing, flash, set_attention
from lowrank.attention.choice import fastest
from lowrank.attention.flash import flash_attention, refusal_of_kernel
from lowrank.attention.setting import setting_of
from lowrank.errors import InputError
from lowrank.training.machine.determinism import deterministic_kernels


def test_auto_on_cpu_says_what_and_why():
    model = tiny.tiny_llama()
    choice = set_attention(model, "auto")
    assert choice.backend == "segments"
    assert model.config._attn_implementation == "lowrank_segments"
    assert str(choice).startswith("attention: segments (")


def test_auto_says_what_dropout_costs():
    assert (
        "attention dropout of 0.1 makes training take O(n²)"
        in set_attention(tiny.tiny_llama(attention_dropout=0.1)).why
    )


def test_backends_are_those_of_the_documentation():
    assert list(BACKENDS) == ["eager", "sdpa", "segments", "flash", "flex", "paged"]


def test_an_unknown_backend_is_told_its_neighbour():
    with pytest.raises(InputError, match="no attention backend `segment`; did you mean `segments`"):
        set_attention(tiny.tiny_llama(), "segment")


@pytest.mark.parametrize(
    ("name", "backend", "why"),
    [
        ("gemma2", "sdpa", "cannot soft-cap"),
        ("gpt_oss", "sdpa", "no attention sinks"),
        ("gpt_oss", "flex", "no attention sinks on CPU"),
        ("llama", "flash", "needs a CUDA device"),
        ("gemma2", "paged", "cannot soft-cap"),
    ],
)
def test_refusals_name_the_reason(name, backend, why):
    model = zoo.build(name)
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=why):
        set_attention(model, backend)
    assert model.config._attn_implementation == before


def test_flex_is_refused_for_training_on_cpu():
    with pytest.raises(InputError, match="no backward pass on CPU"):
        set_attention(tiny.tiny_llama(), "flex", packing=True)


def test_flex_is_refused_for_dropout():
    with pytest.raises(InputError, match="no dropout"):
        set_attention(tiny.tiny_llama(attention_dropout=0.1), "flex")


@pytest.mark.parametrize(
    ("change", "knows", "why"),
    [
        ({"dtype": torch.float32}, {"dropout_p"}, "16 bits"),
        ({"head_dim": 512}, {"dropout_p"}, "larger than 256"),
        ({"sinks": True}, {"window_size"}, "sinks"),
        ({"softcap": True}, {"window_size"}, "soft-cap"),
        ({"window": 16}, {"softcap"}, "window"),
        ({"dropout": 0.1}, {"window_size"}, "dropout"),
        ({"supports_flash": False}, {"window_size"}, "no FlashAttention path"),
        ({"own_masks": True}, {"window_size"}, "masks are more than causal"),
    ],
)
def test_flash_refuses_what_the_installed_version_does_not_know(change, knows, why):
    setting = replace(setting_of(tiny.tiny_llama().to(torch.bfloat16), packing=False))
    assert refusal_of_kernel(setting, knows) is None
    refusal = refusal_of_kernel(replace(setting, **change), knows)
    assert refusal is not None
    assert why in refusal


def test_flash_is_deterministic_where_torch_is(monkeypatch):
    """Whatever the variable says that transformers asks; and refused where the installed version cannot."""
    asked: list[dict] = []

    def kernel(q, k, v, causal=True, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1), deterministic=False):
        asked.append({"deterministic": deterministic})
        return torch.zeros_like(q)

    arguments = theirs._lazy_define_process_function(kernel)
    monkeypatch.setattr(
        theirs, "lazy_import_flash_attention", lambda name: ((kernel, kernel, None, None, None), (arguments, dict))
    )
    model = tiny.tiny_llama()
    module, x = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16)
    setting = setting_of(model.to(torch.bfloat16), packing=False)
    flash_attention(module, x, x, x, None)
    with deterministic_kernels(True):
        flash_attention(module, x, x, x, None)
        assert refusal_of_kernel(setting, {"deterministic"}) is None
        assert "no deterministic kernels" in (refusal_of_kernel(setting, {"dropout_p"}) or "")
    assert [each["deterministic"] for each in asked] == [False, True]


def test_masks_of_its_own_are_known_of_a_model():
    """A text model's are causal unless its config says otherwise; with images in the text they are not."""
    assert not setting_of(zoo.build("gemma3"), packing=False).own_masks
    assert setting_of(_text_and_images(), packing=False).own_masks
    text = transformers.Gemma3TextConfig(**tiny._LLAMA_LIKE, head_dim=8, use_bidirectional_attention=True)
    assert setting_of(tiny.build(text), packing=False).own_masks


def test_layers_may_differ_in_the_size_of_their_heads():
    """gemma4's layers without a window have wider ones; its config refuses to name one size."""
    sizes = {**tiny._LLAMA_LIKE, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(
        **sizes, vocab_size_per_layer_input=tiny.VOCAB, layer_types=kinds, sliding_window=16
    )
    model = tiny.build(config)
    assert setting_of(model, packing=True).head_dim == 16
    assert set_attention(model, "auto", packing=True).backend == "segments"


def _text_and_images():
    text = {**tiny._LLAMA_LIKE, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    return transformers.AutoModelForImageTextToText.from_config(config)


def _bloom():
    return tiny.build(transformers.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4))


def _falcon():
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.build(transformers.FalconConfig(**sizes))


def _mamba():
    return tiny.build(
        transformers.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def _hybrid(config, **more):
    return lambda: tiny.build(config(**{**tiny._LLAMA_LIKE, **more}))


_QWEN3_NEXT = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA_LIKE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}


def _opt():
    return tiny.build(transformers.OPTConfig(**tiny._LLAMA_LIKE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0))


LEAKING = {
    "bloom": _bloom,
    "falcon": _falcon,
    "mamba": _mamba,
    "lfm2": _hybrid(transformers.Lfm2Config, layer_types=["conv", "full_attention"]),
    "qwen3_next": _hybrid(transformers.Qwen3NextConfig, **_QWEN3_NEXT),
    "granitemoehybrid": _hybrid(
        transformers.GraniteMoeHybridConfig, **_MAMBA_LIKE, layer_types=["mamba", "attention"], num_local_experts=2
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAKING)
def test_leaking_architectures_are_refused_by_the_self_test(name, dtype):
    model = LEAKING[name]().to(dtype)
    set_attention(model, "auto", packing=True)
    with pytest.raises(InputError, match=rf"{type(model).__name__} .*cannot train on packs[\s\S]*data.packing: false"):
        check_packing(model)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_opt_counts_its_own_positions_and_needs_to_be_told_the_segments(backend):
    model = _opt()
    set_attention(model, backend, packing=True)
    with pytest.raises(InputError, match=r"OPTForCausalLM .*cannot train on packs"):
        check_packing(model)
    set_attention(model, "auto", packing=True)
    check_packing(model)


def _older(config, **sizes):
    return lambda: tiny.build(config(vocab_size=tiny.VOCAB, **sizes))


_GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
UNSWAPPABLE = {
    "bloom": _bloom,
    "falcon": LEAKING["falcon"],
    "mamba": _mamba,
    "gptj": _older(transformers.GPTJConfig, **_GPT_LIKE),
    "codegen": _older(transformers.CodeGenConfig, **_GPT_LIKE),
    "gpt_neo": _older(
        transformers.GPTNeoConfig, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "mpt": _older(transformers.MptConfig, d_model=32, n_heads=4, n_layers=2),
    "xglm": _older(transformers.XGLMConfig, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "rwkv": _older(transformers.RwkvConfig, hidden_size=32, num_hidden_layers=2),
    "openai-gpt": _older(transformers.OpenAIGPTConfig, n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", UNSWAPPABLE)
def test_a_model_that_cannot_be_swapped_says_so(name):
    model = UNSWAPPABLE[name]()
    before = model.config._attn_implementation
    choice = set_attention(model, "auto")
    assert choice.backend == before == model.config._attn_implementation
    assert "cannot swap" in choice.why
    with pytest.raises(InputError, match="cannot swap the attention of"):
        set_attention(model, "segments")


def test_every_submodel_is_swapped():
    """A model of several parts (text and vision, each with its own config) is changed as a whole."""
    model = _text_and_images()
    set_attention(model, "segments")
    parts = {type(m).__name__: m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert len(parts) > 3
    assert set(parts.values()) == {"lowrank_segments"}


def test_what_transformers_leaves_unchanged_is_noticed(monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "set_attn_implementation", lambda self, name: None)
    with pytest.raises(InputError, match=r"left Llama.* at `.*` instead of `lowrank_segments`"):
        set_attention(tiny.tiny_llama(), "segments")


def test_the_choice_is_not_written_into_saved_configs(tmp_path):
    model = tiny.tiny_llama()
    set_attention(model, "segments")
    model.save_pretrained(tmp_path)
    assert "lowrank" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN3c10\nand more"), OSError("libcudart.so.12")])
def test_a_flash_package_that_cannot_be_imported_is_passed_over_and_told(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(flash, "_version_for", lambda device: 2)
    monkeypatch.setattr(flash, "import_module", broken)
    on_a_card = replace(setting_of(tiny.tiny_llama().to(torch.bfloat16), packing=False), device=torch.device("cuda"))
    told = f"flash_attn is installed and cannot be used: {str(error).splitlines()[0]}"
    assert flash.FLASH.refusal(on_a_card) == told
    choice = fastest(on_a_card)
    assert choice.backend == "segments"
    assert choice.why.endswith(f"; not flash: {told}")
