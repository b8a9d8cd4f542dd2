"""Several adapters into one; the oracle is peft's `add_weighted_adapter`."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama, tiny_qwen2
from weight_helpers import logits, randomise, reload, save_base, with_peft

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.weights import compose, resize
from lowrank.weights.arithmetic.factors import Product, distance, norm, singular, truncated
from lowrank.weights.arithmetic.module_factors import read_factors
from lowrank.weights.files.adapter_file import open_adapter


def make(base: Path, folder: Path, config: object, seed: int) -> Path:
    torch.manual_seed(seed)
    model = lowrank.wrap(reload(base), config)
    randomise(model, 0.1)
    return lowrank.save(model, folder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tiny_llama(), tmp_path / "base")


@pytest.fixture
def two(base: Path, tmp_path: Path) -> list[Path]:
    """Of the same rank, with overlapping targets and different scales."""
    one = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "embed_tokens"], init_lora_weights=False)
    other = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return [make(base, tmp_path / "one", one, 1), make(base, tmp_path / "other", other, 2)]


def peft_composed(base: Path, adapters: list[Path], weights: list[float], **kwargs: object) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(reload(base), adapters[0], adapter_name="a0")
    for i, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, adapter_name=f"a{i}")
    names = [f"a{i}" for i in range(len(adapters))]
    model.add_weighted_adapter(names, weights, "both", **kwargs)
    model.set_adapter("both")
    return logits(model)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        ("linear", {}, {}),
        ("cat", {}, {}),
        ("svd", {"rank": 3}, {"svd_rank": 3}),
        ("ties", {"density": 0.5}, {"density": 0.5}),
        ("ties", {"density": 0.5, "majority_sign": "frequency"}, {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}, {"density": 0.3}),
        ("dare_linear", {"density": 1.0}, {"density": 1.0}),
        ("dare_ties", {"density": 1.0}, {"density": 1.0}),
        ("ties_svd", {"density": 0.5, "rank": 3}, {"density": 0.5, "svd_rank": 3}),
        (
            "ties_svd",
            {"density": 0.4, "majority_sign": "frequency"},
            {"density": 0.4, "majority_sign_method": "frequency"},
        ),
        ("magnitude_prune_svd", {"density": 0.3}, {"density": 0.3}),
        ("dare_linear_svd", {"density": 1.0, "rank": 5}, {"density": 1.0, "svd_rank": 5}),
        ("dare_ties_svd", {"density": 1.0}, {"density": 1.0}),
    ],
)
def test_equal_to_peft(base: Path, two: list[Path], method: str, ours: dict, theirs: dict, weights: list) -> None:
    wanted = peft_composed(base, two, weights, combination_type=method, **theirs)
    lowrank.weights.compose(two, out=base.parent / "both", weights=weights, method=method, **ours)
    torch.testing.assert_close(logits(lowrank.load(reload(base), base.parent / "both")), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(with_peft(base, base.parent / "both"), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_pruning_is_pefts_for_the_same_random_numbers(base: Path, tmp_path: Path, method: str) -> None:
    path = "model.layers.1.self_attn.q_proj"
    config = LoraConfig(r=4, target_modules=[path], init_lora_weights=False)
    two = [make(base, tmp_path / name, config, seed) for name, seed in (("one", 1), ("other", 2))]
    with torch.random.fork_rng():
        model = peft.PeftModel.from_pretrained(reload(base), two[0], adapter_name="a0")
        model.load_adapter(two[1], adapter_name="a1")
        generator_seed = 5 + zlib.crc32(path.encode())
        inject = type(model.base_model).inject_adapter

        def then_seed(*args: object, **kwargs: object) -> None:
            inject(*args, **kwargs)
            torch.manual_seed(generator_seed)

        type(model.base_model).inject_adapter = then_seed
        try:
            model.add_weighted_adapter(["a0", "a1"], [1.0, 0.5], "both", combination_type=method, density=0.4)
        finally:
            type(model.base_model).inject_adapter = inject
    model.set_adapter("both")
    compose(two, out=tmp_path / "both", weights=[1.0, 0.5], method=method, density=0.4, seed=5)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "both")), logits(model), atol=1e-5, rtol=0)


def test_concatenation_is_the_sum_of_the_effects(base: Path, tmp_path: Path) -> None:
    """Different methods, ranks and targets."""
    configs = [
        LoraConfig(r=2, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False),
        LoraConfig(r=5, rank_pattern={"k_proj": 3}, target_modules=["q_proj", "k_proj"], init_lora_weights=False),
        AdaLoraConfig(init_r=4, target_r=2, target_modules=["up_proj"], init_lora_weights=False),
    ]
    adapters = [make(base, tmp_path / f"a{i}", config, i) for i, config in enumerate(configs)]
    report = compose(adapters, out=tmp_path / "all")
    together = reload(base)
    for i, adapter in enumerate(adapters):
        lowrank.load(together, adapter, f"a{i}")
    lowrank.set_active(together, ["a0", "a1", "a2"])
    composed = lowrank.load(reload(base), tmp_path / "all")
    torch.testing.assert_close(logits(composed), logits(together), atol=2e-5, rtol=0)
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 7
    assert report.ranks["model.layers.0.mlp.up_proj"] == 4
    assert report.error < 1e-6


def in_bfloat16(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(adapter / "adapter_config.json", folder)
    return folder


def test_sixteen_bits_lose_nothing(base: Path, two: list[Path], tmp_path: Path) -> None:
    """A scale of 3 is not a power of two, and the other adapter is in float32: the sum is stored in float32."""
    adapters = [in_bfloat16(two[1], tmp_path / "half"), two[0]]
    compose(adapters, out=tmp_path / "both")
    wanted = {}
    for adapter in adapters:
        for path, factors in read_factors(open_adapter(adapter)).items():
            wanted[path] = wanted.get(path, 0) + factors.product.B @ factors.product.A
    for path, factors in read_factors(open_adapter(tmp_path / "both")).items():
        torch.testing.assert_close(factors.product.B @ factors.product.A, wanted[path], rtol=1e-5, atol=1e-7)
    compose([adapters[0]], weights=[0.5], out=tmp_path / "scaled", method="linear")
    compose([in_bfloat16(two[0], tmp_path / "plain")], weights=[0.25], out=tmp_path / "exact")
    assert {t.dtype for t in load_file(tmp_path / "exact" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_differently_quantised_bases_are_told(base: Path, two: list[Path], tmp_path: Path) -> None:
    tensors = load_file(two[1] / "adapter_model.safetensors")
    note = {"lowrank.quantization": json.dumps({"load_in_4bit": True}), "format": "pt"}
    save_file(tensors, two[1] / "adapter_model.safetensors", metadata=note)
    report = compose(two, out=tmp_path / "both")
    assert any("differently quantised" in text for text in report.notes)


def test_negated_and_scaled(base: Path, two: list[Path], tmp_path: Path) -> None:
    compose([two[0]], weights=[-1.0], out=tmp_path / "negative")
    compose([two[0], tmp_path / "negative"], out=tmp_path / "nothing")
    torch.testing.assert_close(
        logits(lowrank.load(reload(base), tmp_path / "nothing")), logits(reload(base)), atol=1e-5, rtol=0
    )
    compose([two[0]], weights=[2.5], out=tmp_path / "more")
    before, after = (read_factors(open_adapter(folder)) for folder in (two[0], tmp_path / "more"))
    for path, factors in before.items():
        wanted = 2.5 * factors.product.B @ factors.product.A
        torch.testing.assert_close(after[path].product.B @ after[path].product.A, wanted)


def test_resize_gives_the_nearest_and_says_how_near(base: Path, two: list[Path], tmp_path: Path) -> None:
    report = resize(two[0], 2, out=tmp_path / "small")
    before, after = (read_factors(open_adapter(folder)) for folder in (two[0], tmp_path / "small"))
    for path, factors in before.items():
        dense = (factors.product.B @ factors.product.A).double()
        left = torch.linalg.svdvals(dense)[2:].norm() / dense.norm()
        assert report.errors[path] == pytest.approx(left.item(), rel=1e-4)
        assert after[path].product.rank == 2
    full = resize(two[0], 99, out=tmp_path / "full")
    assert full.error < 1e-6
    assert set(full.ranks.values()) == {4}


def test_resize_by_energy(two: list[Path], tmp_path: Path) -> None:
    report = resize(two[0], out=tmp_path / "most", energy=0.9)
    assert len(set(report.ranks.values())) > 1 or set(report.ranks.values()) != {4}
    assert all(error <= 0.1**0.5 + 1e-6 for error in report.errors.values())
    model = lowrank.load(tiny_llama(), tmp_path / "most")
    assert logits(model).isfinite().all()


def test_no_dense_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of 40,000 x 40,000 in float64 would take 12 GiB."""
    generator = torch.Generator().manual_seed(0)
    product = Product(torch.randn(4, 40_000, generator=generator), torch.randn(40_000, 4, generator=generator))
    small = truncated(product, 2)
    assert distance(small, product) == pytest.approx(singular(product)[1][2:].norm().item(), rel=1e-4)
    assert norm(product) == pytest.approx(singular(product)[1].norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"method": "average"}, "no method 'average'"),
        ({"weights": [1.0]}, "1 weights are given for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "one finite number each"),
        ({"method": "ties"}, "ties needs a density"),
        ({"method": "cat", "density": 0.5}, "cat has no density"),
        ({"method": "ties", "density": 1.5}, "above 0 and at most 1"),
        ({"method": "cat", "rank": 3}, "chosen by the method svd"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "svd", "energy": 2.0}, "above 0 and at most 1"),
        ({"method": "ties", "density": 0.5, "majority_sign": "mean"}, "no majority sign 'mean'"),
    ],
)
def test_arguments_that_do_not_go_together(two: list[Path], tmp_path: Path, arguments: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        compose(two, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_adapters_that_cannot_be_composed(base: Path, two: list[Path], tmp_path: Path) -> None:
    dora = make(base, tmp_path / "dora", LoraConfig(target_modules=["q_proj"], use_dora=True), 3)
    with pytest.raises(InputError, match="lora_magnitude_vector"):
        compose([two[0], dora], out=tmp_path / "out")
    whole = make(base, tmp_path / "whole", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), 3)
    for given, weights in (([whole, whole], None), ([two[0], whole], [1.0, 0.5])):
        with pytest.raises(InputError, match=r"(?s)lm_head\.weight is saved whole.*sum to 1"):
            compose(given, out=tmp_path / "out", weights=weights)
    biased = make(base, tmp_path / "biased", LoraConfig(target_modules=["q_proj"], bias="lora_only"), 3)
    with pytest.raises(InputError, match=r"down_proj: its bias is the base's"):
        compose([two[1], biased], out=tmp_path / "out")
    other = save_base(tiny_gpt2(), tmp_path / "gpt2")
    stranger = make(other, tmp_path / "stranger", LoraConfig(target_modules=["c_attn"]), 3)
    with pytest.raises(InputError, match="different bases"):
        compose([two[0], stranger], out=tmp_path / "out")


def effects(base: Path, adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """W + Σ wᵢ(Wᵢ - W) of every parameter, each Wᵢ from a merge of its own."""
    before = reload(base).state_dict()
    merged = [lowrank.merge(lowrank.load(reload(base), adapter)).state_dict() for adapter in adapters]
    return {
        name: value + sum(weight * (one[name] - value) for one, weight in zip(merged, weights, strict=True))
        for name, value in before.items()
    }


WHOLE = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
OTHER_WHOLE = LoraConfig(r=3, target_modules=["up_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
TOKENS = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7], init_lora_weights=False)
OTHER_TOKENS = LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[7, 9], init_lora_weights=False)
BIASED = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="lora_only", init_lora_weights=False)
ALL_BIASES = LoraConfig(r=2, target_modules=["q_proj"], bias="all", init_lora_weights=False)
ADDED = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize(
    ("configs", "weights"),
    [
        ([WHOLE, OTHER_WHOLE], [1.0, 1.0]),
        ([WHOLE, WHOLE], [0.3, 0.7]),
        ([TOKENS, OTHER_WHOLE], [1.0, 1.0]),
        ([BIASED, BIASED], [0.5, 0.5]),
        ([ALL_BIASES], [1.0]),
        ([ADDED, BIASED.model_copy(update={"bias": "none"})], [0.7, -0.5]),
    ],
)
def test_what_is_no_factor_is_composed_too(method: str, configs: list, weights: list, tmp_path: Path) -> None:
    base = save_base(tiny_qwen2(tie_word_embeddings=False), tmp_path / "base")
    adapters = [make(base, tmp_path / str(i), config, i) for i, config in enumerate(configs)]
    rank = {"rank": 8} if method == "svd" else {}
    compose(adapters, out=tmp_path / "both", weights=weights, method=method, **rank)
    got = lowrank.merge(lowrank.load(reload(base), tmp_path / "both")).state_dict()
    for name, wanted in effects(base, adapters, weights).items():
        torch.testing.assert_close(got[name], wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_single_tokens_of_two_adapters(base: Path, tmp_path: Path) -> None:
    """A token that both have trained is averaged; one that a single adapter has needs the weight 1."""
    adapters = [make(base, tmp_path / name, TOKENS, seed) for name, seed in (("one", 1), ("other", 2))]
    compose(adapters, out=tmp_path / "both", weights=[0.25, 0.75])
    got = lowrank.merge(lowrank.load(reload(base), tmp_path / "both")).state_dict()
    for name, wanted in effects(base, adapters, [0.25, 0.75]).items():
        torch.testing.assert_close(got[name], wanted, atol=1e-5, rtol=1e-5, msg=name)
    apart = make(base, tmp_path / "apart", OTHER_TOKENS, 3)
    with pytest.raises(InputError, match=r"token 3 of .*is saved whole"):
        compose([adapters[0], apart], out=tmp_path / "wrong", weights=[0.5, 0.5])


def test_adalora_modules_without_a_rank_pass_through(base: Path, tmp_path: Path) -> None:
    """Through composing, resizing and exports; peft and lowrank read what comes out."""
    adapter = make(
        base, tmp_path / "ada", AdaLoraConfig(init_r=4, target_r=2, total_step=9, init_lora_weights=False), 1
    )
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    gone = "model.layers.0.self_attn.q_proj"
    for name, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        key = f"base_model.model.{gone}.{name}"
        tensors[key] = tensors[key].narrow(dim, 0, 0).contiguous()
    kept = {
        name.removeprefix("base_model.model."): tensors[name].shape[0] for name in tensors if name.endswith("lora_E")
    }
    fields["rank_pattern"] = {name: [i < rank for i in range(4)] for name, rank in kept.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(fields))
    wanted = logits(lowrank.load(reload(base), adapter))
    report = compose([adapter], out=tmp_path / "composed")
    assert report.ranks[gone] == 1
    resize(adapter, 4, out=tmp_path / "resized")
    lowrank.weights.export(adapter, tmp_path / "vllm", to="vllm")
    for name in ("composed", "resized", "vllm"):
        torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / name)), wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(with_peft(base, tmp_path / name), wanted, atol=2e-5, rtol=0)
