"""A LoRA from the difference of two checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from weight_helpers import logits, randomise, reload, save_base, tiny_qwen3_moe, with_peft

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import extract, merge_checkpoint
from lowrank.weights.approximate import leading


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
    with pytest.raises(InputError, match=r"Only one of the models has model\.layers\.2"):
        extract(base, deep, r=2, out=tmp_path / "adapter")
    for arguments, why in (({}, "Neither"), ({"r": 0}, "at least 1"), ({"energy": 1.5}, "at most 1")):
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
