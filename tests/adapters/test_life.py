"""The life of an adapter on a model: several at once, switched, routed, compiled, copied, trained by others, gone."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import transformers
from datasets import Dataset
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn
from trl import SFTConfig, SFTTrainer

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters import delete, rename
from lowrank.adapters.install import hosts
from lowrank.errors import InputError

IDS = torch.arange(3, 23)[None]
RANDOM = {"init_lora_weights": False}
CONFIGS = {
    "lora": LoraConfig(r=4, **RANDOM),
    "dora": LoraConfig(r=4, use_dora=True, **RANDOM),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=0.1, **RANDOM),
}


@pytest.fixture
def three():
    """A model with three adapters of different methods, ranks and targets, and each one's logits."""
    model = tiny_llama()
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **RANDOM), adapter="a")
    lowrank.wrap(model, LoraConfig(r=4, use_dora=True, **RANDOM), adapter="b")
    lowrank.wrap(model, AdaLoraConfig(init_r=3, target_r=2, lora_alpha=0.1, target_modules=["up_proj"], **RANDOM), "c")
    alone = {}
    for name in "abc":
        with lowrank.using(model, name):
            alone[name] = model(IDS).logits
    return model, alone


def test_switch_stack_and_silence(three):
    model, alone = three
    assert set(lowrank.describe(model)) == {"a", "b", "c"}
    assert torch.equal(model(IDS).logits, alone["c"])  # the last one wrapped acts
    base = tiny_llama()(IDS).logits
    with lowrank.disabled(model):
        assert torch.equal(model(IDS).logits, base)
    lowrank.set_active(model, ["a", "c"])
    merged = lowrank.merge(copy.deepcopy(model))
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, atol=1e-5, rtol=1e-5)
    lowrank.set_active(model, ["a", "b"])
    torch.testing.assert_close(model(IDS).logits, lowrank.merge(copy.deepcopy(model))(IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="no adapter 'x'; it has a, b, c"):
        lowrank.set_active(model, "x")


def test_routed_rows_are_what_each_adapter_does_alone(three):
    model, alone = three
    rows = ["b", None, "a", "b", "c"]
    with lowrank.disabled(model):
        base = model(IDS).logits
    with lowrank.routed(model, rows):
        out = model(IDS.repeat(5, 1)).logits
    for row, name in zip(out, rows, strict=True):
        torch.testing.assert_close(row, (base if name is None else alone[name])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="given 2 rows"), lowrank.routed(model, ["a", "b"]):
        model(IDS)
    assert torch.equal(model(IDS).logits, alone["c"])


def test_rename_and_delete(three):
    model, alone = three
    rename(model, "a", "first")
    with lowrank.using(model, "first"):
        assert torch.equal(model(IDS).logits, alone["a"])
    delete(model, "c")
    delete(model, "b")
    assert set(lowrank.describe(model)) == {"first"}
    assert "adapters" not in model.model.layers[0].mlp.up_proj._modules
    with pytest.raises(InputError, match="the model has an adapter 'first' already"):
        lowrank.wrap(model, CONFIGS["lora"], adapter="first")
    delete(model, "first")
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_unwrap_gives_back_the_very_modules(make):
    model = make()
    model.get_input_embeddings().weight.requires_grad_(False)
    modules = dict(model.named_modules())
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for config in CONFIGS.values():
        assert lowrank.wrap(model, config) is model
        assert type(model) is type(make())
        assert all(dict(model.named_modules())[path] is module for path, module in modules.items())
        assert {name: value.data_ptr() for name, value in model.state_dict().items() if name in state} == {
            name: pointer for name, (pointer, _) in state.items()
        }
        assert lowrank.unwrap(model) is model
        assert dict(model.named_modules()) == modules
        assert all("forward" not in module.__dict__ for module in modules.values())
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name][1]) for name, value in model.state_dict().items())


def test_a_failed_wrap_leaves_the_model_as_it_was():
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(InputError):
        lowrank.wrap(model, LoraConfig(r=3, init_lora_weights="orthogonal"))
    with pytest.raises(InputError, match="is asked for twice"):
        lowrank.wrap(model, LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[5]))
    assert dict(model.named_modules()) == modules
    assert lowrank.describe(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_one_model_is_wrapped_through_one_module():
    """The whole would not obey the activity of its part: an adapter that is there and does nothing."""
    model = lowrank.wrap(tiny_llama(), CONFIGS["lora"])
    with pytest.raises(InputError, match="put in through another module than this LlamaModel"):
        lowrank.wrap(model.model, CONFIGS["lora"], "second")
    lowrank.unwrap(model)
    lowrank.wrap(model.model, CONFIGS["lora"])
    with pytest.raises(InputError, match="put in through another module than this LlamaForCausalLM"):
        lowrank.wrap(model, CONFIGS["lora"], "second")


@pytest.mark.parametrize("name", ["activity", "training", "keys", "a.b", ""])
def test_names_that_a_module_needs_itself_are_refused(name):
    with pytest.raises(InputError, match="is no name for an adapter"):
        lowrank.wrap(tiny_llama(), CONFIGS["lora"], name)


@pytest.mark.parametrize("training", [False, True])
def test_a_new_layer_is_in_its_models_mode(training, tmp_path):
    """A model as `from_pretrained` gives it is in evaluation: nothing of its input may be dropped out."""
    config = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, modules_to_save=["lm_head"])
    lowrank.save(lowrank.wrap(tiny_llama(), config), tmp_path)
    for put_in in (lambda m: lowrank.wrap(m, config), lambda m: lowrank.load(m, tmp_path)):
        model = put_in(tiny_llama().train(training))
        assert {module.training for module in model.modules()} == {training}
        assert torch.equal(model(IDS).logits, model(IDS).logits) != training


def test_a_replaced_forward_is_not_lost():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: 0 * x
    with pytest.raises(InputError, match="has had its forward replaced"):
        lowrank.wrap(model, CONFIGS["lora"])
    assert not model(torch.ones(1, 4)).any()


def test_routing_costs_what_the_batch_holds_and_not_what_is_loaded(three):
    model, _ = three
    calls = []
    for _, _, adapters in hosts(model):
        for name, layer in adapters.layers().items():
            layer.term = functools.partial(_counted, calls, name, layer.term)
    with lowrank.routed(model, ["a", None, "a", "a"]):
        model(IDS.repeat(4, 1))
    modules = lowrank.describe(model)["a"].modules
    assert calls == ["a"] * len(modules)


def _counted(calls, name, term, module):
    calls.append(name)
    return term(module)


@pytest.mark.parametrize("method", CONFIGS)
class TestUnder:
    def test_copies_and_pickles(self, method):
        model = lowrank.wrap(tiny_llama(), CONFIGS[method])
        expected = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IDS).logits, expected)
            with lowrank.disabled(other):
                assert not torch.equal(other(IDS).logits, expected)
            assert torch.equal(model(IDS).logits, expected)

    def test_compile_without_graph_breaks(self, method):
        layer = lowrank.wrap(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), CONFIGS[method])
        x = torch.randn(3, 8)
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)

    def test_a_whole_model_compiles_without_graph_breaks(self, method):
        model = lowrank.wrap(tiny_llama(num_hidden_layers=1), CONFIGS[method])
        expected = model(IDS, use_cache=False).logits
        torch._dynamo.reset()
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS, use_cache=False).logits
        torch.testing.assert_close(got, expected)
        weights = torch.linspace(-1, 1, got.numel()).view_as(got)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.autograd.grad((logits * weights).sum(), parameters) for logits in (got, expected)]
        torch.testing.assert_close(*grads)

    def test_autocast(self, method):
        model = lowrank.wrap(tiny_llama(), CONFIGS[method])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        with torch.no_grad():
            plain = model(IDS, labels=IDS).loss
        assert abs(float(loss.detach()) - float(plain)) < 0.05 * float(plain)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, method, reentrant):
        grads = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = lowrank.wrap(tiny_llama(), CONFIGS[method]).train()
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model(IDS, labels=IDS).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        torch.testing.assert_close(*grads)

    def test_dtypes_and_modes(self, method):
        model = lowrank.wrap(tiny_llama(), CONFIGS[method])
        expected = model(IDS).logits
        assert model.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
        torch.testing.assert_close(model.double()(IDS).logits.float(), expected, atol=0.1, rtol=0.1)
        assert all(not module.training for module in model.train().eval().modules())

    def test_generate(self, method):
        model = lowrank.wrap(tiny_llama(), CONFIGS[method])
        ids = model.generate(IDS, max_new_tokens=6, do_sample=False)
        merged = lowrank.merge(model).generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(ids, merged)


def rows() -> Dataset:
    return Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 8)


def check_only_adapters_moved(model, before):
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".adapters." in name for name in moved)


def test_transformers_trainer_trains_it(tmp_path):
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=4))
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.01, report_to=[], use_cpu=True, save_strategy="no"
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows()).train()
    check_only_adapters_moved(model, before)


def test_trls_sft_trainer_trains_it(tmp_path):
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=4))
    before = copy.deepcopy(model.state_dict())
    arguments = SFTConfig(
        tmp_path, max_steps=2, learning_rate=0.01, report_to=[], use_cpu=True, bf16=False, save_strategy="no"
    )
    data = Dataset.from_list([{"text": "hello there, how are you"}] * 8)
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer()).train()
    check_only_adapters_moved(model, before)
