"""DoRA's norm: right after each change of what it is made of, and made without any dense product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import LoraConfig

WIDTH = 64


class Largest(TorchDispatchMode):
    """The most values that a newly made tensor had."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.values = max(self.values, tensor.numel())
        return out


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, use_dora=True, init_lora_weights=False)
    return lowrank.wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)


def by_the_paper(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """m · (W + s·B·A) / ‖W + s·B·A‖, dense."""
    linear = model[0]
    layer = linear.adapters["default"]
    W = linear.weight + layer.scale * layer.lora_B @ layer.lora_A
    norm = torch.linalg.vector_norm(W, dim=1).detach()
    return x @ (layer.lora_magnitude_vector[:, None] * W / norm[:, None]).t() + linear.bias


def test_a_step_makes_nothing_of_the_weights_size():
    model = adapted().train()
    x = torch.randn(3, WIDTH, requires_grad=True)
    with Largest(list(model.parameters())) as seen:
        model(x).square().sum().backward()
    assert 0 < seen.values <= 3 * WIDTH  # neither B·A nor an identity: those have WIDTH² values


def test_it_is_the_papers_formula_forward_and_backward():
    model, x = adapted(), torch.randn(3, WIDTH)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got, expected = model(x), by_the_paper(model, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changed", ["lora_A", "lora_B", "weight", "lora_magnitude_vector"])
def test_what_is_cached_follows_every_change(changed: str, training: bool, frozen: bool):
    model, x = adapted().train(training).requires_grad_(not frozen), torch.randn(3, WIDTH)
    layer = model[0].adapters["default"]
    for _ in range(2):
        torch.testing.assert_close(model(x), by_the_paper(model, x), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            (model[0] if changed == "weight" else layer).get_parameter(changed).add_(0.3)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    torch.testing.assert_close(model(x), by_the_paper(model, x), atol=1e-4, rtol=1e-4)


def test_trained_factors_are_followed_past_their_version_counter():
    model, x = adapted().eval(), torch.randn(3, WIDTH)
    model(x)
    model[0].adapters["default"].lora_A.data.mul_(3)
    torch.testing.assert_close(model(x), by_the_paper(model, x), atol=1e-5, rtol=1e-5)


def test_the_norm_is_made_once_where_all_is_frozen(monkeypatch):
    model, x = adapted().eval().requires_grad_(False), torch.randn(3, WIDTH)
    expected = model(x)
    monkeypatch.setattr("lowrank.ops.dora_norm.dora_norm", None)
    assert torch.equal(model(x), expected)


def test_inference_tensors_are_not_cached():
    with torch.inference_mode():
        model, x = adapted().eval(), torch.randn(3, WIDTH)
        for _ in range(2):
            torch.testing.assert_close(model(x), by_the_paper(model, x), atol=1e-5, rtol=1e-5)
            model[0].adapters["default"].lora_A.mul_(2)


def by_data(model, x):
    model[0].weight.data.mul_(2)


def one_row(model, x):
    model[0].weight.data[3] = torch.randn(WIDTH)


def factors(model, x):
    model[0].adapters["default"].lora_B.data.mul_(3)


def replaced(model, x):
    model[0].weight.data = torch.randn(WIDTH, WIDTH)


def there_and_back(model, x):
    model.to(torch.bfloat16).to(torch.float32)


def loaded(model, x):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def scaled(model, x):
    lowrank.set_scale(model, "default", 0.3)


@pytest.mark.parametrize("change", [by_data, one_row, factors, replaced, there_and_back, loaded, scaled])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_kept_norm_notices_every_change(change, frozen):
    model, x = adapted().eval().requires_grad_(not frozen), torch.randn(3, WIDTH)
    for _ in range(2):
        model(x)
    change(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_the_paper(model, x), atol=1e-4, rtol=1e-4)
