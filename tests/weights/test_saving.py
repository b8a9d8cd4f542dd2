"""Adapters to peft's files and back: peft is the oracle, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VOCAB, build, tiny_gpt2, tiny_llama, tiny_qwen2
from weight_helpers import IDS, edit_json, logits, peft_adapter, randomise, reload, save_base, with_peft

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.weights.files.adapter_file import open_adapter


def tiny_neox():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return build(transformers.GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2, "neox": tiny_neox}
ATTENTION = {"llama": ["q_proj", "o_proj"], "gpt2": ["c_attn"], "qwen2": ["q_proj", "v_proj"], "neox": ["dense"]}


@pytest.fixture(params=MODELS)
def base(request, tmp_path: Path) -> Path:
    return save_base(MODELS[request.param](), tmp_path / request.param)


def fields(base: Path, method: str) -> dict[str, object]:
    """Keyword arguments that mean the same to peft's LoraConfig and to ours."""
    attention = ATTENTION[base.name]
    return {
        "lora": {"target_modules": "all-linear", "r": 4},
        "rslora": {"target_modules": attention, "r": 4, "use_rslora": True},
        "dora": {"target_modules": "all-linear", "r": 4, "use_dora": True},
        "patterns": {
            "target_modules": attention,
            "rank_pattern": {attention[0]: 2},
            "alpha_pattern": {attention[-1]: 3},
            "layers_to_transform": [1],
        },
        "bias": {"target_modules": attention, "bias": "lora_only"},
        "bias all": {"target_modules": attention, "bias": "all"},
    }[method]


METHODS = ["lora", "rslora", "dora", "patterns", "bias", "bias all"]


@pytest.mark.parametrize("method", METHODS)
def test_reads_what_peft_saved(base: Path, method: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields(base, method))
    wanted = peft_adapter(base, tmp_path / "adapter", config)
    model = reload(base)
    before = logits(model)
    loaded = lowrank.load(model, tmp_path / "adapter")
    assert loaded is model
    assert not torch.allclose(before, wanted, atol=1e-3)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_what_is_saved(base: Path, method: str, tmp_path: Path) -> None:
    model = lowrank.wrap(reload(base), LoraConfig(init_lora_weights=False, **fields(base, method)))
    randomise(model)
    wanted = logits(model)
    lowrank.save(model, tmp_path / "adapter")
    torch.testing.assert_close(with_peft(base, tmp_path / "adapter"), wanted, atol=1e-5, rtol=0)
    again = lowrank.load(reload(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), wanted, atol=0, rtol=0)


def test_adalora_both_ways(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=6, target_r=3, total_step=10, init_lora_weights=False
    )
    wanted = peft_adapter(base, tmp_path / "theirs", config)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "theirs")), wanted, atol=1e-5, rtol=0)

    ours = AdaLoraConfig(target_modules=["q_proj"], init_r=6, target_r=3, total_step=10, init_lora_weights=False)
    model = lowrank.wrap(reload(base), ours)
    lowrank.save(model, tmp_path / "ours")
    torch.testing.assert_close(with_peft(base, tmp_path / "ours"), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings_and_whole_modules(use_dora: bool, tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    config = peft.LoraConfig(
        use_dora=use_dora,
        task_type="CAUSAL_LM",
        target_modules=["embed_tokens", "q_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    wanted = peft_adapter(base, tmp_path / "theirs", config)
    model = lowrank.load(reload(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    lowrank.save(model, tmp_path / "ours")
    torch.testing.assert_close(with_peft(base, tmp_path / "ours"), wanted, atol=1e-5, rtol=0)


def test_transformers_reads_it(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    model = lowrank.wrap(reload(base), LoraConfig(init_lora_weights=False))
    lowrank.save(model, tmp_path / "adapter")
    theirs = reload(base)
    theirs.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


def test_the_file_is_what_peft_writes(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4}
    peft_adapter(base, tmp_path / "theirs", peft.LoraConfig(task_type="CAUSAL_LM", **config))
    lowrank.save(lowrank.wrap(reload(base), LoraConfig(**config)), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    theirs["target_modules"].sort()
    assert ours == {key: theirs[key] for key in ours}
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_all_linear_is_saved_as_names(tmp_path: Path) -> None:
    model = lowrank.wrap(tiny_gpt2(), LoraConfig())
    lowrank.save(model, tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["c_attn", "c_fc", "c_proj"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = lowrank.wrap(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    return lowrank.save(model, tmp_path / "adapter")


def test_other_files_stay_and_an_adapter_is_not_overwritten(adapter: Path) -> None:
    (adapter / "run.yaml").write_text("kept")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    model = lowrank.wrap(tiny_llama(), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(InputError, match=r"already holds adapter_config\.json"):
        lowrank.save(model, adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    lowrank.save(model, adapter, overwrite=True)
    assert open_adapter(adapter).config.target_modules == ["v_proj"]
    assert (adapter / "run.yaml").read_text() == "kept"
    assert not list(adapter.parent.glob(".*"))


def rewrite(adapter: Path, change) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata=metadata)


NAME = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def damage(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME.format(0, "A")]
    tensors[NAME.format(0, "X")] = torch.ones(3)
    tensors[NAME.format(1, "B")] = torch.ones(5, 4)


def test_everything_that_does_not_fit_is_listed(adapter: Path) -> None:
    rewrite(adapter, damage)
    model = tiny_llama()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(InputError) as caught:
        lowrank.load(model, adapter)
    for piece in ("missing: model.layers.0", "unexpected: model.layers.0", "misshapen: model.layers.1", "[5, 4]"):
        assert piece in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not lowrank.describe(model)


def test_a_load_that_fails_leaves_the_others_acting(adapter: Path) -> None:
    model = lowrank.load(tiny_llama(), adapter)
    expected = logits(model)
    rewrite(adapter, damage)
    with pytest.raises(InputError, match="does not fit this model"):
        lowrank.load(model, adapter, "second")
    assert {name: info.active for name, info in lowrank.describe(model).items()} == {"default": True}
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


def test_not_strict_says_what_it_skipped(adapter: Path) -> None:
    rewrite(adapter, damage)
    model = tiny_llama()
    with pytest.warns(UserWarning, match="skipped because it does not fit: missing: model.layers.0"):
        lowrank.load(model, adapter, strict=False)
    assert "default" in lowrank.describe(model)


def test_nan_is_refused_always(adapter: Path) -> None:
    rewrite(adapter, lambda tensors: tensors[NAME.format(1, "A")][0].fill_(float("nan")))
    for strict in (True, False):
        model = tiny_llama()
        with pytest.raises(InputError, match="NaN or infinity"):
            lowrank.load(model, adapter, strict=strict)
        assert not lowrank.describe(model)


def test_nan_is_not_saved(tmp_path: Path) -> None:
    model = lowrank.wrap(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    next(p for p in model.parameters() if p.requires_grad).data[0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        lowrank.save(model, tmp_path / "broken")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"vocab_size": VOCAB + 8}, rf"vocab_size {VOCAB} \(here {VOCAB + 8}\)"),
        ({"num_hidden_layers": 3}, r"layers 2 \(here 3\)"),
        ({"intermediate_size": 64}, r"intermediate_size 48 \(here 64\)"),
    ],
)
def test_another_base_is_refused(adapter: Path, other: dict[str, int], what: str) -> None:
    with pytest.raises(InputError, match=what):
        lowrank.load(tiny_llama(**other), adapter)
    with pytest.raises(InputError, match=r"model_type llama \(here qwen2\)"):
        lowrank.load(tiny_qwen2(), adapter)


def test_a_pickle_is_read_as_tensors_alone(adapter: Path) -> None:
    """What peft wrote before safetensors; anything else in it could run code, and is refused."""
    wanted = logits(lowrank.load(tiny_llama(), adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    torch.testing.assert_close(logits(lowrank.load(tiny_llama(), adapter)), wanted, atol=0, rtol=0)
    for content in ({"a": Path("x")}, [1]):
        torch.save(content, adapter / "adapter_model.bin")
        with pytest.raises(InputError, match="pickle"):
            lowrank.load(tiny_llama(), adapter)
    (adapter / "adapter_model.bin").rename(adapter / "pytorch_lora.bin")
    with pytest.raises(InputError, match=r"pickle \(pytorch_lora\.bin\)"):
        lowrank.load(tiny_llama(), adapter)


def test_unknown_keys_pass_only_at_their_neutral_value(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    edit_json(config, arrow_config=None, use_qalora=False, qalora_group_size=16, layer_replication=None, new_thing=[])
    lowrank.load(tiny_llama(), adapter)
    edit_json(config, layer_replication=[[0, 2]], use_qalora=True)
    with pytest.raises(
        InputError, match=r"layer_replication: \[\[0, 2\]\]; use_qalora: True|use_qalora: True; layer_r"
    ):
        lowrank.load(tiny_llama(), adapter)


def test_an_old_file_with_few_keys(adapter: Path) -> None:
    """peft 0.2 wrote these keys and no others."""
    old = {
        "base_model_name_or_path": "x",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = tiny_llama()
    wanted = logits(lowrank.load(tiny_llama(), adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(old))
    lowrank.load(model, adapter)
    torch.testing.assert_close(logits(model), wanted, atol=0, rtol=0)


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda"])
def test_factors_of_a_changed_base_are_refused(adapter: Path, init: str) -> None:
    edit_json(adapter / "adapter_config.json", init_lora_weights=init)
    with pytest.raises(InputError, match="belongs to a base that this changed"):
        lowrank.load(tiny_llama(), adapter)


def test_pissa_is_saved_against_the_untouched_base(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    model = lowrank.wrap(reload(base), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa"))
    randomise(model, 0.05)
    lowrank.save(model, tmp_path / "adapter")
    torch.testing.assert_close(with_peft(base, tmp_path / "adapter"), logits(model), atol=1e-5, rtol=0)
    assert open_adapter(tmp_path / "adapter").config.r == 8


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_took_out_of_the_base_is_taken_out_again(init: str, tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=init)
    wanted = peft_adapter(base, tmp_path / "adapter", config)
    edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=init)
    model = lowrank.load(reload(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="belongs to a base that this changed"):
        lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def test_adalora_as_an_ordinary_lora(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "llama")
    model = lowrank.wrap(reload(base), AdaLoraConfig(init_r=6, target_r=3, total_step=10, init_lora_weights=False))
    lowrank.save(model, tmp_path / "adapter", as_lora=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(with_peft(base, tmp_path / "adapter"), logits(model), atol=1e-5, rtol=0)


def test_several_adapters_and_trainable(adapter: Path) -> None:
    model = lowrank.load(tiny_llama(), adapter, "one")
    assert not any(p.requires_grad for p in model.parameters())
    lowrank.load(model, adapter, "two", trainable=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if ".two." in name
    }
    alone = logits(lowrank.load(tiny_llama(), adapter))
    torch.testing.assert_close(logits(model), alone, atol=0, rtol=0)
    assert model(IDS).logits.shape[-1] == VOCAB


def test_a_path_that_is_the_end_of_another_is_meant_alone(tmp_path: Path) -> None:
    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Sequential(torch.nn.Linear(8, 8))
            self.up = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.up(x))

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Body(), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    torch.manual_seed(0)
    weights = Whole().state_dict()

    def base() -> Whole:
        model = Whole()
        model.load_state_dict(weights)
        return model

    x = torch.linspace(-1, 1, 16).view(2, 8)
    model = lowrank.wrap(base(), LoraConfig(r=2))
    randomise(model)
    wanted = model(x)
    lowrank.save(model, tmp_path / "a")
    lowrank.compose([tmp_path / "a"], weights=[1.0], out=tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        torch.testing.assert_close(lowrank.load(base(), folder)(x), wanted)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), folder)(x), wanted)


def test_peft_runs_a_saved_model_of_speech(tmp_path: Path) -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    side = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 10}
    config = transformers.WhisperConfig(**side, **ids, **sizes, vocab_size=96, max_target_positions=16)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "base")

    def base() -> transformers.PreTrainedModel:
        return transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")

    model = lowrank.wrap(base(), LoraConfig(r=2))
    randomise(model)
    lowrank.save(model, tmp_path / "a")
    inputs = {"input_features": torch.ones(1, 8, 20), "decoder_input_ids": torch.tensor([[3, 9, 5]])}
    read = peft.PeftModel.from_pretrained(base(), tmp_path / "a")
    torch.testing.assert_close(read(**inputs).logits, model.eval()(**inputs).logits)


def test_ends_that_begin_at_no_dot_are_whole_in_peft(tmp_path: Path) -> None:
    folder = save_base(tiny_llama(), tmp_path / "base")
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}  # in peft every input_layernorm too
    theirs = peft.get_peft_model(reload(folder), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **fields))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    ours = lowrank.wrap(reload(folder), LoraConfig(r=2, **fields))
    randomise(ours)
    lowrank.save(ours, tmp_path / "ours")
    for name, wanted in (("peft", logits(theirs)), ("ours", logits(ours))):
        torch.testing.assert_close(logits(lowrank.load(reload(folder), tmp_path / name)), wanted)
        torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(reload(folder), tmp_path / name)), wanted)
        lowrank.merge_checkpoint(folder, tmp_path / name, tmp_path / f"{name}-merged")
        torch.testing.assert_close(logits(reload(tmp_path / f"{name}-merged")), wanted, atol=1e-5, rtol=1e-5)
