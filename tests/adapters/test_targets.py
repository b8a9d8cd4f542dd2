"""Which modules get an adapter, of which rank and scale: what peft gives them, on every architecture."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import pytest
import torch
import transformers
from architectures import MODELS
from peft.tuners.lora import LoraLayer

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SELECTIONS = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "a longer suffix": {"target_modules": ["0.self_attn.q_proj", "v_proj"]},
    "a regular expression": {"target_modules": r".*layers\.\d+\.(self_attn|mlp)\.[quv].*_proj"},
    "a whole path": {"target_modules": r"model\.layers\.1\.mlp\.up_proj"},
    "excluded by suffix": {"target_modules": PROJECTIONS, "exclude_modules": ["k_proj", "1.mlp.up_proj"]},
    "excluded by expression": {"target_modules": PROJECTIONS, "exclude_modules": r".*\.1\..*proj"},
    "some layers": {"target_modules": PROJECTIONS, "layers_to_transform": [1]},
    "one layer": {"target_modules": PROJECTIONS, "layers_to_transform": 0},
    "layers by pattern": {"target_modules": PROJECTIONS, "layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks": {"target_modules": PROJECTIONS, "r": 4, "rank_pattern": {"q_proj": 2, r"layers.1.mlp.up_proj": 16}},
    "ranks by expression": {"target_modules": PROJECTIONS, "rank_pattern": {r".*\.0\..*": 3, "down_proj": 7}},
    "an anchored rank": {"target_modules": PROJECTIONS, "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 5}},
    "alphas": {"target_modules": PROJECTIONS, "lora_alpha": 8, "alpha_pattern": {"v_proj": 32, "1.mlp.up_proj": 2}},
    "both": {
        "target_modules": PROJECTIONS,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 16},
        "alpha_pattern": {"k_proj": 64, "o_proj": 1},
    },
    "saved whole": {"target_modules": PROJECTIONS, "modules_to_save": ["k_proj"]},
}


def ours(model, fields: dict) -> dict[str, tuple[int, float]]:
    """Rank and scale of every adapted module."""
    lowrank.wrap(model, LoraConfig(**fields))
    saved = set(fields.get("modules_to_save", []))
    found = {}
    for path in lowrank.describe(model)["default"].modules:
        layer = model.get_submodule(path).adapters["default"]
        if path.rpartition(".")[2] not in saved:
            found[path] = (layer.lora_A.shape[0], layer.scale)
    return found


def theirs(model, fields: dict) -> dict[str, tuple[int, float]]:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields))
    return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in lora_layers(wrapped)}


def lora_layers(wrapped) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "olmo2"])
def test_the_same_modules_ranks_and_scales_as_peft(name, selection):
    fields = SELECTIONS[selection]
    expected = theirs(MODELS[name](), fields)
    assert ours(MODELS[name](), fields) == expected
    assert expected


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_peft_s(name):
    """But for what peft adapts besides: the heads of models whose head has no name of its own there."""
    model = MODELS[name]()
    if not isinstance(model, transformers.PreTrainedModel) or "moe" in name:
        pytest.skip("routers: see test_routers_and_heads_are_left_out")
    expected = theirs(MODELS[name](), {"target_modules": "all-linear"})
    assert set(ours(model, {"target_modules": "all-linear"})) == set(expected)


def test_routers_and_heads_are_left_out():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    paths = set(ours(model, {"target_modules": "all-linear"}))
    assert paths == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}
    classifier = transformers.AutoModelForSequenceClassification.from_config(MODELS["llama"]().config)
    assert "score" not in ours(classifier, {"target_modules": "all-linear"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_porj"]}, "'q_porj' matches no module; did you mean q_proj"),
        ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no module"),
        ({"target_modules": "q_proj"}, "must match a module's whole path"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["self_attn"]}, "no adapter fits that"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module is left"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "no module is left"),
    ],
)
def test_what_matches_nothing_is_refused(fields, message):
    model = MODELS["llama"]()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        lowrank.wrap(model, LoraConfig(**fields))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
