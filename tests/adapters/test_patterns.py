"""Every pattern of every field names something; what names nothing is refused with the nearest right spelling."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from architectures import MODELS
from safetensors import safe_open
from tiny import tiny_llama

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError

QV = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**QV, "rank_pattern": {"q_prj": 64}}, r"rank_pattern: 'q_prj' matches no adapted module; did you mean q_proj"),
        ({**QV, "rank_pattern": {"k_proj": 64}}, r"rank_pattern: 'k_proj' matches no adapted module"),
        ({**QV, "alpha_pattern": {"v_porj": 6}}, r"alpha_pattern: 'v_porj' .* did you mean v_proj"),
        ({**QV, "alpha_pattern": {"(v": 6}}, r"alpha_pattern: '\(v' is not a regular expression"),
        ({**QV, "exclude_modules": ["layer.0"]}, r"exclude_modules: 'layer.0' matches no module"),
        ({**QV, "exclude_modules": ["self_attn"]}, r"exclude_modules: 'self_attn' matches .* holds only other modules"),
        ({**QV, "exclude_modules": r".*\.layer\.0\..*"}, r"exclude_modules: .* matches no module"),
        ({**QV, "layers_to_transform": [0, 99]}, r"layers_to_transform: 99 is a layer with no .* the layers are 0 to 1"),
        ({**QV, "layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]}, r"layers_pattern: 'blocks' .* layers"),
        ({**QV, "modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed' matches no module; did you mean lm_head"),
        ({**QV, "trainable_token_indices": {"embed_token": [1]}}, r"'embed_token' names no embedding .* embed_tokens"),
        ({"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]}, r"'embed_tokens' matches model.embed_"),
    ],
)  # fmt: skip
def test_what_names_nothing_is_refused(fields, message):
    model = MODELS["llama"]()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        lowrank.wrap(model, LoraConfig(**fields))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_what_names_something_is_taken():
    for fields in (
        {**QV, "exclude_modules": ["lm_head", "1.self_attn.v_proj"]},
        {**QV, "rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {**QV, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    ):
        lowrank.wrap(MODELS["llama"](), LoraConfig(**fields))
    with pytest.raises(InputError, match="rank_pattern"):
        lowrank.wrap(MODELS["llama"](), AdaLoraConfig(**QV, rank_pattern={"q_proj": [True]}))


@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_a_full_path_beside_layers_to_transform_is_taken_as_it_stands(name):
    fields = {"target_modules": ["q_proj", name], "layers_to_transform": [0]}
    model = lowrank.wrap(MODELS["llama"](), LoraConfig(**fields))
    theirs = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(**fields))
    adapted = {path for path, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(lowrank.describe(model)["default"].modules) == adapted
    assert name in adapted


def test_a_file_of_pefts_with_idle_patterns_loads(tmp_path):
    """peft passes over names that a model does not have: its tensors say what is adapted."""
    torch.manual_seed(0)
    fields = {"rank_pattern": {"nope": 3}, "exclude_modules": ["other"], "init_lora_weights": False}
    theirs = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(target_modules=["q_proj", "nowhere"], **fields))
    theirs.save_pretrained(tmp_path)
    model = lowrank.load(MODELS["llama"](), tmp_path)
    ids = torch.arange(3, 15).view(2, 6)
    torch.testing.assert_close(model(ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize(
    ("make", "task", "heads"),
    [
        ("LlamaForSequenceClassification", "SEQ_CLS", ["score"]),
        ("LlamaForTokenClassification", "TOKEN_CLS", ["score"]),
        ("LlamaForQuestionAnswering", "QUESTION_ANS", ["qa_outputs"]),
        ("BertForSequenceClassification", "SEQ_CLS", ["classifier"]),
        ("RobertaForSequenceClassification", "SEQ_CLS", ["classifier"]),
        ("DistilBertForSequenceClassification", "SEQ_CLS", ["classifier", "pre_classifier"]),
        ("BertForQuestionAnswering", "QUESTION_ANS", ["qa_outputs"]),
    ],
)
def test_the_head_of_a_task_trains_and_is_saved_as_in_peft(make, task, heads, tmp_path):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small = {**sizes, "num_attention_heads": 2, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    cls = getattr(transformers, make)
    config = cls.config_class(**small, pad_token_id=0, num_labels=2)

    def model():
        torch.manual_seed(0)
        return cls(config).eval()

    targets = ["q_proj", "query", "q_lin"]
    target = [next(name for name in targets if any(p.endswith(name) for p, _ in model().named_modules()))]
    theirs = peft.get_peft_model(model(), peft.LoraConfig(task_type=task, target_modules=target))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.wrap(model(), LoraConfig(task_type=task, target_modules=target))
    assert (
        sorted({n.split(".adapters")[0] for n, p in ours.named_parameters() if p.requires_grad} & set(heads)) == heads
    )
    ids = torch.arange(3, 15).view(2, 6)
    out = ours(ids)
    (out.logits if "logits" in out else out.start_logits + out.end_logits).square().sum().backward()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            assert p.requires_grad == (p.grad is not None), name
            p += 0.1 * torch.ones_like(p) if p.requires_grad else 0
    lowrank.save(ours, tmp_path / "ours")
    names = [set(safe_open(tmp_path / who / "adapter_model.safetensors", "pt").keys()) for who in ("theirs", "ours")]
    assert names[0] == names[1]
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == task
    outputs = [
        lowrank.load(model(), tmp_path / "ours")(ids)[0],
        peft.PeftModel.from_pretrained(model(), tmp_path / "ours").eval()(ids)[0],
        lowrank.merge(ours)(ids)[0],
    ]
    for output in outputs:
        torch.testing.assert_close(output, out[0] * 0 + outputs[0], atol=1e-5, rtol=1e-4)
    lowrank.load(model(), tmp_path / "theirs")


def test_a_task_without_its_head_is_refused():
    with pytest.raises(InputError, match="task_type is SEQ_CLS"):
        lowrank.wrap(MODELS["llama"](), LoraConfig(task_type="SEQ_CLS"))


def test_peft_models_are_refused():
    inside = MODELS["llama"]()
    inside.add_adapter(peft.LoraConfig(**QV))
    for model in (peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(**QV)), inside):
        with pytest.raises(InputError, match="carries adapters of peft"):
            lowrank.wrap(model, LoraConfig(**QV))
        with pytest.raises(InputError, match="carries adapters of peft"):
            lowrank.merge(model)


def test_all_that_means_nothing_is_told_at_once():
    config = LoraConfig(
        target_modules=["q_proj"], rank_pattern={"q_prj": 4}, exclude_modules=["layer.0"], layers_to_transform=[0, 99]
    )
    with pytest.raises(InputError) as raised:
        lowrank.wrap(tiny_llama(), config)
    assert all(name in str(raised.value) for name in ("'q_prj'", "'layer.0'", "99"))
