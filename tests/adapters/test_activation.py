"""What acts, and when: blocks in any order, in threads, under recomputation and compilers."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.training.transforms.recompute import recompute_activations

IDS = torch.arange(3, 23)[None]
RANDOM = {"init_lora_weights": False}


def two() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    lowrank.wrap(model, LoraConfig(target_modules=["0"], **RANDOM), "a")
    lowrank.wrap(model, LoraConfig(target_modules=["0", "2"], use_dora=True, bias="all", **RANDOM), "b")
    return model, torch.randn(2, 4)


def acting(model: nn.Module, x: torch.Tensor, names: str | list[str]) -> torch.Tensor:
    lowrank.set_active(model, names)
    return model(x)


@pytest.fixture
def known():
    model, x = two()
    each = {name: acting(model, x, name).detach() for name in "ab"}
    each["base"] = acting(model, x, []).detach()
    lowrank.set_active(model, "b")
    return model, x, each


def test_the_innermost_block_says_what_acts_and_each_gives_back_what_was(known):
    model, x, each = known
    mixed = torch.stack([each["a"][0], each["base"][1]])
    with lowrank.routed(model, ["a", None]):
        torch.testing.assert_close(model(x), mixed)
        with lowrank.routed(model, [None, None]):
            torch.testing.assert_close(model(x), each["base"])
        torch.testing.assert_close(model(x), mixed)
        with lowrank.using(model, "b"):
            torch.testing.assert_close(model(x), each["b"])
            with lowrank.routed(model, ["a", "a"]):
                torch.testing.assert_close(model(x), each["a"])
        torch.testing.assert_close(model(x), mixed)
        with pytest.raises(RuntimeError), lowrank.using(model, "a"), lowrank.routed(model, ["b", "b"]):
            raise RuntimeError
        torch.testing.assert_close(model(x), mixed)
    torch.testing.assert_close(model(x), each["b"])


@pytest.mark.parametrize("inner", [lambda m: lowrank.routed(m, ["a", "b"]), lambda m: lowrank.using(m, "a")])
def test_disabled_is_the_base_whatever_is_around_or_inside(known, inner):
    model, x, each = known
    with inner(model), lowrank.disabled(model):
        assert torch.equal(model(x), each["base"])
    with lowrank.disabled(model), inner(model):
        assert torch.equal(model(x), each["base"])
        assert not any(info.active for info in lowrank.describe(model).values())
    assert torch.equal(model(x), each["b"])


def test_set_active_inside_a_block_holds_after_it(known):
    model, x, each = known
    with lowrank.using(model, "b"):
        lowrank.set_active(model, "a")
        assert torch.equal(model(x), each["b"])
    assert torch.equal(model(x), each["a"])


def test_a_copy_goes_on_as_the_model_is(known):
    model, x, each = known
    with lowrank.using(model, "a"):
        twin = copy.deepcopy(model)
    with lowrank.routed(model, ["a", None]):
        other = copy.deepcopy(model)
    assert torch.equal(twin(x), each["a"])
    assert torch.equal(other(x), each["b"])
    torch.testing.assert_close(lowrank.merge(twin)(x), each["a"])


def test_two_threads_each_using_another_do_not_disturb_one_another(known):
    model, x, each = known
    barrier, right = threading.Barrier(3), {}

    def work(name: str) -> None:
        block = nullcontext() if name == "base" else lowrank.using(model, name)
        with block:
            for _ in range(50):
                barrier.wait()
                right[name] = right.get(name, True) and torch.equal(model(x), each[name])

    lowrank.set_active(model, [])
    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "base")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == {"a": True, "b": True, "base": True}


def gradients(model: nn.Module) -> torch.Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat([grad.flatten() for grad in grads])


def rebuild(reentrant: bool):
    def enable(model):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return enable


RECOMPUTED = {
    "reentrant": rebuild(True),
    "not reentrant": rebuild(False),
    "lowrank": lambda model: recompute_activations(model, True),
    "lowrank, selective": lambda model: recompute_activations(model, "selective"),
}
BLOCKS = {
    "using": lambda m: lowrank.using(m, "a"),
    "routed": lambda m: lowrank.routed(m, ["a", "b"]),
    "disabled": lowrank.disabled,
    "scaled": lambda m: lowrank.scaled(m, "b", 0.3),
}


@pytest.mark.parametrize("enable", RECOMPUTED.values(), ids=RECOMPUTED)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_what_acted_is_what_is_recomputed(enable, block):
    def grads(when: str) -> torch.Tensor:
        model = tiny_llama().train()
        torch.manual_seed(0)
        lowrank.wrap(
            model, AdaLoraConfig(init_r=4, target_r=2, lora_alpha=0.1, target_modules=["q_proj"], **RANDOM), "a"
        )
        lowrank.wrap(model, LoraConfig(target_modules=["v_proj", "up_proj"], use_dora=True, **RANDOM), "b")
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        enable(model)
        x = IDS.repeat(2, 1)
        with block(model):
            loss = model(x, labels=x).loss
            if when == "inside":
                loss.backward()
        if when == "after":
            loss.backward()
        elif when == "under another":
            with lowrank.using(model, "b"):
                loss.backward()
        elif when == "after a switch":
            lowrank.set_active(model, [])
            loss.backward()
        return gradients(model)

    right = grads("inside")
    assert right.any()
    for when in ("after", "under another", "after a switch"):
        torch.testing.assert_close(grads(when), right)


@pytest.mark.parametrize("reentrant", [False, True])
def test_torchs_own_checkpoint_nested_and_run_backward_by_another_thread(reentrant):
    model, x = two()
    x.requires_grad_()

    def inner(y):
        return checkpoint(model, y, use_reentrant=reentrant)

    def outer(y):
        with lowrank.using(model, "b"):
            z = checkpoint(model, y, use_reentrant=reentrant)
        return inner(z)

    def grads(run, backward) -> torch.Tensor:
        with lowrank.using(model, "a"):
            loss = run(x).square().sum()
        backward(loss)
        return gradients(model)

    def plain(y):
        with lowrank.using(model, "b"):
            z = model(y)
        return model(z)

    def elsewhere(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    right = grads(plain, torch.Tensor.backward)
    for backward in (torch.Tensor.backward, elsewhere):
        torch.testing.assert_close(grads(lambda y: checkpoint(outer, y, use_reentrant=reentrant), backward), right)


class Rerun(torch.autograd.Function):
    """Somebody's own recomputation."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, *grads):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, *grads)
        return None, x.grad


def test_a_recomputation_that_is_not_torchs_is_right_or_refused():
    model, x = two()
    x.requires_grad_()
    with lowrank.using(model, "a"):
        model(x).sum().backward()
        right = gradients(model)
        Rerun.apply(model, x).sum().backward()
        torch.testing.assert_close(gradients(model), right)
        loss = Rerun.apply(model, x).sum()
    with pytest.raises(InputError, match=r"not by torch\.utils\.checkpoint"):
        loss.backward()
    with lowrank.using(model, "a"):
        loss = Rerun.apply(model, x).sum()
    with pytest.raises(InputError, match=r"not by torch\.utils\.checkpoint"), lowrank.using(model, "a"):
        loss.backward()


def test_a_hook_may_run_the_model_in_a_block_of_its_own(known):
    model, x, each = known
    seen = []

    def hook(grad):
        with lowrank.using(model, "a"):
            seen.append(torch.equal(model(x), each["a"]))

    y = model(x)
    y.register_hook(hook)
    y.sum().backward()
    assert seen == [True]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_code_obeys_blocks(known, fresh_compiler):
    model, x, each = known
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), each["b"])
    with lowrank.using(model, "a"):
        torch.testing.assert_close(compiled(x), each["a"])
        with lowrank.disabled(model):
            torch.testing.assert_close(compiled(x), each["base"])
        loss = checkpoint(compiled, x.requires_grad_(), use_reentrant=False).sum()
    with lowrank.scaled(model, "b", 0.5):
        torch.testing.assert_close(compiled(x), model(x))
    loss.backward()
    got = gradients(model)
    with lowrank.using(model, "a"):
        model(x).sum().backward()
    torch.testing.assert_close(got, gradients(model))


class TestTogether:
    def test_two_that_hold_the_same_module_whole_are_refused_by_all_verbs(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for name in "ab":
            lowrank.wrap(model, LoraConfig(target_modules=["0"], modules_to_save=["1"]), name)
        lowrank.wrap(model, LoraConfig(target_modules=["1"]), "c")
        for names, message in ((["a", "b"], "copy of the whole of 1, and 'b'"), (["c", "b"], "the two cannot act")):
            with pytest.raises(InputError, match=message):
                lowrank.set_active(model, names)
            with pytest.raises(InputError, match=message), lowrank.using(model, names):
                pass
            with pytest.raises(InputError, match=message):
                lowrank.merge(model, names)

    def test_token_rows_that_overlap_are_refused_and_others_act_and_merge_together(self):
        def model():
            m = tiny_llama(tie_word_embeddings=True)
            for name, tokens in {"a": [3, 5], "b": [4], "c": [5, 7]}.items():
                lowrank.wrap(m, LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens, **RANDOM), name)
                m.model.embed_tokens.adapters[name].rows.data += 0.5
            return m

        torch.manual_seed(0)
        m = model()
        with pytest.raises(InputError, match=r"trains the tokens \[5\] of model.embed_tokens, and 'c'"):
            lowrank.set_active(m, ["a", "c"])
        lowrank.set_active(m, ["a", "b"])
        expected = m(IDS).logits
        merged = lowrank.merge(m)
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight

    def test_two_with_all_biases_act_and_merge_together(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        for name, target in {"a": "0", "b": "2"}.items():
            lowrank.wrap(model, LoraConfig(target_modules=[target], bias="all", **RANDOM), name)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.data += torch.randn_like(parameter)
        lowrank.set_active(model, ["a", "b"])
        x = torch.randn(3, 4)
        expected = model(x)
        torch.testing.assert_close(lowrank.merge(model)(x), expected)
