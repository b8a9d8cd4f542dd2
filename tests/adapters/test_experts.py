"""Adapters on fused experts, against peft: the same file names, numbers and gradients, and none of its dense sums."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from expert_models import ARCHITECTURES, IDS, TARGETS, all_stacks, config_of, logits, model_of, stacks
from peft.utils import get_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank.adapters import adapter_tensors
from lowrank.adapters.experts.fused import ExpertsLayer
from lowrank.adapters.install import hosts

PREFIX = "base_model.model."
IMPLEMENTATIONS = [(name, None) for name in ARCHITECTURES] + [
    (name, how) for name in ("qwen3_moe", "gpt_oss") for how in ("eager", "batched_mm")
]


def peft_of(model, targets: list[str], seed: int = 1, **fields: object) -> peft.PeftModel:
    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 8, "target_modules": [], "init_lora_weights": False, **fields}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_parameters=targets, **config)).eval()


def take(model, tensors: dict[str, torch.Tensor], adapter: str = "default") -> None:
    live = adapter_tensors(model, adapter)
    assert {PREFIX + name for name in live} == set(tensors)
    for name, tensor in live.items():
        tensor.copy_(tensors[PREFIX + name])


def gradients(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    """By the file's names: lora_B is kept transposed."""
    found = {}
    for path, module, adapters in hosts(model):
        layer = adapters[adapter]
        assert isinstance(layer, ExpertsLayer)
        for name, tensor in layer.in_file(module).items():
            parameter = next(p for p in layer.parameters() if p.data_ptr() == tensor.data_ptr())
            assert parameter.grad is not None
            found[f"{PREFIX}{path}.{name}"] = parameter.grad.t() if "lora_B" in name else parameter.grad
    return found


def both(name: str, targets: list[str] | None = None, **fields: object):
    """The base, peft's model and ours with the same factors."""
    base = model_of(name)
    targets = targets or all_stacks(base)
    theirs = peft_of(base, targets, **fields)
    ours = lowrank.wrap(copy.deepcopy(base), config_of(targets, lora_alpha=8, **fields))
    take(ours, get_peft_model_state_dict(theirs))
    return base, theirs, ours


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_files_logits_and_gradients_are_pefts(name: str, implementation: str | None):
    base, theirs, ours = both(name)
    if implementation:
        ours.set_experts_implementation(implementation)
    expected, got = logits(theirs), logits(ours)
    assert (expected - logits(base)).abs().max() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, gradient in get_peft_model_state_dict(theirs, state_dict=grads).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_merged_weights_are_pefts(name: str):
    base, theirs, ours = both(name)
    adapted = logits(ours)
    merged, expected = lowrank.merge(ours), dict(theirs.merge_and_unload().named_parameters())
    for path, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[path], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-5)
    assert [path for path, _ in merged.named_modules()] == [path for path, _ in base.named_modules()]
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


def test_a_merge_rounds_once():
    model = model_of("qwen3_moe").to(torch.bfloat16)
    lowrank.wrap(model, config_of(TARGETS, init_lora_weights=False, lora_alpha=30))
    path = "model.layers.0.mlp.experts"
    W, tensors = model.get_parameter(f"{path}.down_proj").detach().clone(), adapter_tensors(model, "default")
    A = tensors[f"{path}.lora_A.weight"].clone().view(4, 3, 24)  # (experts, r, in)
    B = tensors[f"{path}.lora_B.weight"].clone().view(32, 3, 4)  # (out, r, experts)
    exact = W.double() + 10 * torch.einsum("ore,eri->eoi", B.double(), A.double())
    merged = lowrank.merge(model).get_parameter(f"{path}.down_proj")
    assert merged.dtype == torch.bfloat16
    assert (merged == exact.float().to(torch.bfloat16)).float().mean() > 0.999  # but for ties of the float32 sum
    assert not torch.equal(merged, W)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("modules", [[], "all-linear"], ids=["experts-alone", "all-linear"])
def test_a_folder_goes_to_peft_and_back(name: str, modules: list[str] | str, tmp_path):
    base = model_of(name)
    ours = lowrank.wrap(copy.deepcopy(base), config_of(TARGETS, target_modules=modules, init_lora_weights=False))
    expected = logits(ours)
    lowrank.save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), expected, rtol=0, atol=1e-6)
    base.load_adapter(tmp_path / "ours")
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=1e-5)


def test_an_adapter_that_peft_converted_from_gate_and_up_loads_with_the_rank_it_was_given(tmp_path):
    base = model_of("qwen3_moe")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    assert theirs.peft_config["default"].rank_pattern, "peft doubles the rank of the fused pair"
    theirs.save_pretrained(tmp_path)
    ours = lowrank.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_ranks_and_alphas_by_parameter_are_pefts_and_nothing_else_changes_them():
    fields = {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {r"layers.1\..*down_proj": 40}, "use_rslora": True}
    _, theirs, ours = both("qwen3_moe", TARGETS, **fields)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert lowrank.describe(ours)["default"].matched == dict.fromkeys(TARGETS, 2)
    plain = lowrank.wrap(model_of("qwen3_moe"), config_of(TARGETS, r=2))
    assert {len(tensor) for name, tensor in adapter_tensors(plain, "default").items() if "lora_A" in name} == {8}


def test_a_routers_weight_is_a_parameter_too():
    _, theirs, ours = both("qwen3_moe", ["mlp.gate.weight", "experts.down_proj"])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [True, "gaussian"])
def test_a_new_adapter_starts_as_the_base(how: bool | str):
    base = model_of("gpt_oss")
    ours = lowrank.wrap(copy.deepcopy(base), config_of(TARGETS, init_lora_weights=how))
    assert torch.equal(logits(ours), logits(base))
    tensors = adapter_tensors(ours, "default")
    spread = {name: tensor.std().item() for name, tensor in tensors.items()}
    wanted = 1 / 3 if how == "gaussian" else (1 / 3 / 32) ** 0.5  # uniform on ±1/√in
    assert spread["model.layers.0.mlp.experts.base_layer.lora_A.weight"] == pytest.approx(wanted, rel=0.1)
    assert all(value == 0 for name, value in spread.items() if "lora_B" in name)


def test_several_adapters_add_and_go_away_again():
    base = model_of("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = peft_of(base, TARGETS)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=5, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
    theirs.add_adapter("second", config)
    ours = lowrank.wrap(copy.deepcopy(base), config_of(TARGETS, lora_alpha=8))
    lowrank.wrap(ours, config_of(TARGETS, r=5), "second")
    take(ours, get_peft_model_state_dict(theirs))
    take(ours, get_peft_model_state_dict(theirs, adapter_name="second"), "second")
    theirs.base_model.set_adapter(["default", "second"])
    lowrank.set_active(ours, ["default", "second"])
    together = logits(theirs)
    torch.testing.assert_close(logits(ours), together, rtol=0, atol=1e-5)
    theirs.set_adapter("default")
    with lowrank.using(ours, "default"):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    with lowrank.disabled(ours):
        assert torch.equal(logits(ours), logits(base))
    merged = lowrank.merge(copy.deepcopy(ours))
    torch.testing.assert_close(logits(merged), together, rtol=0, atol=1e-5)
    lowrank.adapters.delete(ours, "second")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    lowrank.unwrap(ours)
    after = ours.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("forward" in module.__dict__ for module in ours.modules())


def test_adapters_on_different_parameters_of_a_module_act_together():
    base = model_of("qwen3_moe")
    one, two = ([name] for name in TARGETS)
    ours = lowrank.wrap(copy.deepcopy(base), config_of(one, init_lora_weights=False))
    lowrank.wrap(ours, config_of(two, init_lora_weights=False), "second")
    lowrank.set_active(ours, ["default", "second"])
    merged = lowrank.merge(copy.deepcopy(ours))
    torch.testing.assert_close(logits(merged), logits(ours), rtol=0, atol=1e-5)
    changed = {
        name.rpartition(".")[2] for name, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(name))
    }
    assert changed == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(again):
    _, _, ours = both("gpt_oss")
    expected = logits(ours)
    other = again(ours)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        for _, _, adapters in hosts(ours):
            for parameter in adapters.parameters():
                parameter.zero_()
    assert torch.equal(logits(other), expected)
    assert not torch.equal(logits(ours), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    _, _, ours = both("qwen3_moe")
    logits(ours).square().sum().backward()
    expected = {name: gradient.clone() for name, gradient in gradients(ours).items()}
    ours.zero_grad()
    ours.train()
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    logits(ours).square().sum().backward()
    for name, gradient in gradients(ours).items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
def test_the_compiler_sees_no_break(name: str, dtype: torch.dtype):
    model = model_of(name, num_hidden_layers=1).to(dtype)
    lowrank.wrap(model, config_of(TARGETS, init_lora_weights=False))
    experts = next(module for path, module in model.named_modules() if path.endswith(".experts"))
    x = torch.randn(8, 32, dtype=dtype)
    routing = () if name == "llama4_text" else (torch.arange(16).view(8, 2) % 4, torch.rand(8, 2, dtype=dtype))
    expected = experts(x, *routing)
    torch._dynamo.reset()
    got = torch.compile(experts, fullgraph=True, backend="eager")(x, *routing)
    torch.testing.assert_close(got, expected)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that is made, views of what was there before left out."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_no_dense_delta_is_formed_forward_or_backward(implementation: str):
    model = model_of("qwen3_moe", num_experts=16, num_hidden_layers=1)
    lowrank.wrap(model, config_of(TARGETS, r=4, init_lora_weights=False))
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(8, 32, requires_grad=True)
    with LargestTensor(list(model.parameters())) as seen:
        experts(x, torch.arange(16).view(8, 2), torch.rand(8, 2)).sum().backward()
    assert seen.largest <= 16 * 4 * 48  # the factors' gradients; a delta has 16 · 48 · 32 values or 16 · 32 · 24
    assert seen.largest < min(parameter.numel() for parameter in stacks(model).values())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_four_bit_experts_train_and_merge_as_the_weights_they_stand_for(name: str):
    quantised, dense = model_of(name), model_of(name)
    for path, module in quantised.named_modules():
        if path.endswith(".experts"):
            for parameter in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, parameter, quant_type="nf4")
                dense.get_parameter(f"{path}.{parameter}").data.copy_(getattr(module, parameter))
    bits = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    theirs = peft_of(dense, TARGETS)
    lowrank.wrap(quantised, config_of(TARGETS, lora_alpha=8))
    take(quantised, get_peft_model_state_dict(theirs))
    expected = logits(theirs)
    torch.testing.assert_close(logits(quantised), expected, rtol=0, atol=1e-5)
    logits(quantised).square().sum().backward()
    logits(theirs).square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, gradient in get_peft_model_state_dict(theirs, state_dict=grads).items():
        torch.testing.assert_close(gradients(quantised)[name], gradient, rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(quantised)
    merged = lowrank.merge(quantised)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert [type(module) for module in merged.modules()] == [type(module) for module in dense.modules()]
    after = lowrank.unwrap(copied).state_dict()
    assert after.keys() == bits.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in bits.items())


def test_a_step_moves_the_factors_of_the_experts_that_were_used_and_nothing_else():
    model = model_of("qwen3_moe").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowrank.wrap(model, config_of(TARGETS, init_lora_weights=False))
    start = {name: tensor.clone() for name, tensor in adapter_tensors(model, "default").items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in adapter_tensors(model, "default").items())
    lowrank.unwrap(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
