"""merge, compose, resize, extract, export and info through the command itself: what they write, print and refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

import lowrank
from lowrank import LoraConfig
from lowrank.cli import main

PLACE = "model.layers.0.self_attn.q_proj"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return lowrank.save(lowrank.wrap(model, config), base.parent / "adapter")


def weight(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[f"{PLACE}.weight"]


def delta(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{PLACE}.lora_{x}.weight"] for x in "AB")
    return B @ A


@pytest.mark.parametrize("verb", ["merge", "compose", "resize", "extract", "export", "info"])
def test_help_with_an_example(verb: str, capsys) -> None:
    assert run(verb, "--help") == 0
    assert f"Example: lowrank {verb}" in " ".join(capsys.readouterr().out.split())


def test_merge_verifies_and_says_what_rounding_lost(base: Path, adapter: Path, tmp_path: Path, capsys) -> None:
    assert run("merge", adapter, tmp_path / "merged", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert re.search(r"merged into .*/merged: 4 of 21 tensors changed, 0 MiB in .* s \(.* MiB/s\)", out)
    assert re.search(r"rounding lost \d+\.\d\d% of the adapter's effect \(most in model\.", out)
    assert "verified: 4 tensors, each on a random vector" in out
    assert run("merge", adapter, tmp_path / "answering", "--verify", "answers") == 0
    out = capsys.readouterr().out
    assert re.search(r"verified: answers to 4 prompts \(\d+ tokens\): .*% of the greedy choices are the same", out)
    torch.testing.assert_close(
        weight(tmp_path / "merged").float(), weight(base) + 2 * delta(adapter), rtol=4e-3, atol=0
    )
    assert run("merge", adapter, tmp_path / "again", "--no-verify") == 0
    assert "not verified" in capsys.readouterr().out
    assert "verified" not in capsys.readouterr().out


def test_merge_goes_beside_the_adapter_unless_a_folder_is_named(
    adapter: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("merge", "adapter/", "--no-verify") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ask it: lowrank chat adapter-merged"
    torch.testing.assert_close(weight(tmp_path / "adapter-merged"), weight(tmp_path / "base") + 2 * delta(adapter))
    assert run("merge", adapter) == 2
    err = capsys.readouterr().err
    assert "not empty" in err
    assert f"lowrank merge {adapter} OUT" in err
    monkeypatch.chdir(adapter)
    assert run("merge", ".", "--no-verify") == 2
    assert "adapter-merged" in capsys.readouterr().err
    assert run("merge", ".", tmp_path / "a named one", "--no-verify") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"ask it: lowrank chat '{tmp_path / 'a named one'}'"
    assert run("merge", "--help") == 0
    assert "-merged at its end" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_merge_names_the_flag_that_helps(base: Path, adapter: Path, tmp_path: Path, capsys) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[f"{PLACE}.weight"][0, 0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert run("merge", adapter, tmp_path / "merged", "--dtype", "float16") == 2
    assert "--dtype" in capsys.readouterr().err


def test_merge_shows_its_progress_in_bytes(adapter: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes standard error for a terminal
    assert run("merge", adapter, tmp_path / "merged", "--no-verify") == 0
    assert re.search(r"merging.*\d/\d+(\.\d)? (bytes|[kM]B)", capsys.readouterr().err)


def test_merge_of_an_adapter_that_does_not_say(adapter: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert run("merge", adapter, tmp_path / "plain", "--no-verify") == 0
    assert "--trained-over" in capsys.readouterr().out
    assert run("merge", adapter, tmp_path / "merged", "--trained-over", "nf4", "--no-verify") == 0
    assert "--trained-over" not in capsys.readouterr().out
    off = (weight(tmp_path / "merged") - weight(tmp_path / "plain")).norm() / weight(tmp_path / "plain").norm()
    assert 0.01 < off < 0.2


def test_quantising_again_is_refused_with_the_reason(adapter: Path, tmp_path: Path, capsys) -> None:
    assert run("merge", adapter, tmp_path / "merged", "--onto", "quantised") == 2
    assert "larger than most of the adapter's changes" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_compose_and_resize(adapter: Path, tmp_path: Path, capsys) -> None:
    assert run("compose", adapter, adapter, "--out", tmp_path / "both", "--weight", "2", "--weight", "-0.5") == 0
    assert "ranks 8 (4 modules)\ndistance from the weighted sum of the effects: 0.00%" in capsys.readouterr().out
    torch.testing.assert_close(delta(tmp_path / "both"), 1.5 * 2 * delta(adapter))
    assert run("compose", adapter, "--out", tmp_path / "less", "--weight", "-1") == 0
    torch.testing.assert_close(delta(tmp_path / "less"), -2 * delta(adapter))
    capsys.readouterr()
    assert run("resize", adapter, tmp_path / "small", "--rank", "2") == 0
    error = re.search(r"ranks 2 \(4 modules\)\ndistance .* effects: (.*)%", capsys.readouterr().out)
    assert error is not None
    assert 1 < float(error[1]) < 99


def test_extract_prints_what_each_module_keeps(base: Path, adapter: Path, tmp_path: Path, capsys) -> None:
    assert run("merge", adapter, tmp_path / "tuned", "--no-verify") == 0
    capsys.readouterr()
    assert run("extract", base, tmp_path / "tuned", tmp_path / "found", "--energy", "0.9999") == 0
    out = capsys.readouterr().out
    assert f"{PLACE}: rank 4, 100.00% of the difference kept" in out
    assert re.search(r"into .*/found: 100.00% of the difference kept", out)
    torch.testing.assert_close(delta(tmp_path / "found"), 2 * delta(adapter), atol=1e-5, rtol=0)


def test_export_says_how_it_is_used(adapter: Path, tmp_path: Path, capsys) -> None:
    for target, use in (("vllm", "--max-lora-rank 8"), ("llama.cpp", "convert_lora_to_gguf.py --base")):
        assert run("export", adapter, tmp_path / target, "--to", target) == 0
        assert use in capsys.readouterr().out
        torch.testing.assert_close(delta(tmp_path / target), 2 * delta(adapter))
    assert run("export", adapter, tmp_path / "one.safetensors", "--to", "safetensors") == 0


def test_info(adapter: Path, capsys) -> None:
    assert run("info", adapter) == 0
    out = capsys.readouterr().out
    for piece in ("lora, lora_alpha 8", "4 (4 modules)", "2 × down_proj", "MiB", "‖ΔW‖ per layer", "█"):
        assert piece in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["merge", "no/such/place", "out"], "no adapter folder no/such/place"),
        (["merge", "cut", "out"], "damaged"),
        (["merge", "adapter", "base/out"], "lie in one another"),
        (["merge", "adapter", "base"], "not empty"),
        (["compose", "adapter", "--out", "out", "--method", "ties"], "needs a density"),
        (["resize", "adapter", "out"], "neither a rank nor an energy"),
        (["extract", "base", "base", "out", "--r", "2"], "do not differ"),
        (["export", "adapter", "adapter/x", "--to", "vllm"], "lie in one another"),
        (["info", "base"], "no adapter folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_and_nothing_is_changed(
    arguments: list[str], why: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(
            file.read_bytes()[:-10] if "model" in file.name else file.read_bytes()
        )
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert why in err
    assert "Traceback" not in err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
