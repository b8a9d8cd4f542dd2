"""In which dtype a run computes: asked for, or what is fastest here; kept when it is resumed."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

from lowrank import Callback, train
from lowrank.config import load_config
from lowrank.errors import InputError
from lowrank.models import load_model
from lowrank.quantisers.bitsandbytes import BitsAndBytes
from lowrank.recipes.check import check
from lowrank.recipes.parts import products, setup
from lowrank.storage.machine_load import Load
from lowrank.training.transforms.compute_dtype import why_not_wide


@pytest.fixture
def narrow(tmp_path):
    """A base in bfloat16, and the same numbers in float32."""
    model = tiny_llama().to(torch.bfloat16)
    for name, each in (("bf16", model), ("f32", model)):
        each.to(torch.bfloat16 if name == "bf16" else torch.float32).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def _faster(monkeypatch, times):
    monkeypatch.setattr(products, "times_as_fast", lambda dtype, than, shapes: times)


def _run(write_config, output, training=None, **model):
    sections = {"model": model, "training": {"output_dir": output, "num_train_epochs": 1} | (training or {})}
    return write_config(f"{output}.yaml", **sections)


class _StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, run, metrics):
        run.stop = run.step == self.step


def _told(capsys):
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def _trained(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def test_float32_where_it_is_faster_equals_the_float32_run(write_config, narrow, monkeypatch, capsys):
    _faster(monkeypatch, 4.0)
    result = train(_run(write_config, "wide", name_or_path=str(narrow / "bf16")))
    assert "float32: products are 4.0 times as fast here as in bfloat16" in _told(capsys)
    exact = train(_run(write_config, "exact", name_or_path=str(narrow / "f32")))
    assert result.after.loss == pytest.approx(exact.after.loss, rel=1e-5)
    wide, of_f32 = _trained("wide"), _trained("exact")
    for name, tensor in wide.items():
        torch.testing.assert_close(tensor, of_f32[name], rtol=1e-4, atol=2e-5)


def test_the_weights_dtype_where_that_is_faster(write_config, narrow, monkeypatch, capsys):
    _faster(monkeypatch, 0.5)
    train(_run(write_config, "out", name_or_path=str(narrow / "bf16")))
    told = _told(capsys)
    assert "bfloat16, as the weights were loaded: products are 2.0 times as fast here as in float32" in told
    _faster(monkeypatch, 4.0)
    train(_run(write_config, "asked", name_or_path=str(narrow / "bf16"), compute_dtype="bfloat16"))
    one, other = _trained("out"), _trained("asked")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_resumed_run_computes_as_it_began(write_config, narrow, monkeypatch):
    _faster(monkeypatch, 4.0)
    steps = {"save_steps": 2, "max_steps": 4}
    whole = _run(write_config, "whole", steps, name_or_path=str(narrow / "bf16"))
    train(whole)
    assert load_config("whole/config.yaml").model.compute_dtype == "float32"
    parted = _run(write_config, "parted", steps, name_or_path=str(narrow / "bf16"))
    train(parted, callbacks=[_StopsAt(2)])
    _faster(monkeypatch, 0.5)
    train(parted, resume=True)
    one, other = _trained("whole"), _trained("parted")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert load_config("parted/config.yaml").model.compute_dtype == "float32"


def test_fewer_digits_than_the_weights_are_used_where_asked(write_config, narrow, capsys):
    train(_run(write_config, "out", name_or_path=str(narrow / "f32"), compute_dtype="bfloat16"))
    assert "products in bfloat16" in _told(capsys)


@pytest.mark.parametrize(
    ("asked", "adapter", "says"),
    [
        ("float16", {}, "its weights are in bfloat16, of which float16 does not hold all values"),
        ("float32", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trains as a whole"),
    ],
)
def test_what_cannot_be_computed_so_is_refused(write_config, narrow, asked, adapter, says):
    config = write_config(model={"name_or_path": str(narrow / "bf16"), "compute_dtype": asked}, adapter=adapter)
    with pytest.raises(InputError, match=says) as refused:
        train(config)
    assert refused.value.where == "model.compute_dtype"


def test_what_keeps_the_weights_dtype_is_told(write_config, narrow, monkeypatch, capsys):
    _faster(monkeypatch, 4.0)
    train(
        write_config(
            model={"name_or_path": str(narrow / "bf16")},
            adapter={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        )
    )
    assert "4.0 times as fast here as in bfloat16, but lm_head trains as a whole" in _told(capsys)


def test_bitsandbytes_name_for_it_does_the_same(write_config, narrow, monkeypatch, capsys):
    _faster(monkeypatch, 4.0)
    base = str(narrow / "bf16")
    quantised = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    train(write_config("theirs.yaml", model={"name_or_path": base}, quantization=quantised))
    assert "products bfloat16" in _told(capsys)
    theirs = _trained("out")
    ours = {"model": {"name_or_path": base, "compute_dtype": "bfloat16"}, "quantization": {"load_in_4bit": True}}
    train(write_config("ours.yaml", training={"output_dir": "ours"}, **ours))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in _trained("ours").items())
    train(write_config("free.yaml", training={"output_dir": "free"}, **ours | {"model": {"name_or_path": base}}))
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in _trained("free").items())


def test_a_four_bit_layer_without_adapter_computes_in_its_inputs_dtype(narrow):
    model = load_model(str(narrow / "bf16"), quantization={"load_in_4bit": True})
    layer = model.model.layers[0].self_attn.q_proj
    dense = BitsAndBytes().weight(layer).double()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        x = torch.randn(3, dense.shape[1]).to(dtype)
        assert layer(x).dtype == dtype
    said, wanted = layer(x).detach(), x.double() @ dense.t()
    assert not torch.equal(said, said.bfloat16().float())
    rounding = x.double().abs() @ dense.abs().t() * 2.0**-8  # on some processors weights are not brought to their dtype
    assert ((said.double() - wanted).abs() <= rounding).all()


def test_weights_that_accelerate_moves_keep_their_dtype(narrow):
    model = load_model(str(narrow / "bf16"))
    add_hook_to_module(model.model.layers[0].mlp, AlignDevicesHook("cpu", offload=True, weights_map={}))
    assert "accelerate moves what model.layers.0.mlp computes with" in why_not_wide(model)


def test_a_machine_that_others_use_is_told_before_the_first_step(write_config, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for busy, told in ((1.1, True), (0.1, False)):
        monkeypatch.setattr(setup, "load_since", lambda began, busy=busy: Load(cores=2, busy=busy, threads=2))
        check(write_config(f"{busy}.yaml", model={"device": "cpu"}))
        shown = _told(capsys)
        assert ("machine shared: other programs keep 1.1 of 2 cores busy" in shown) == told
        assert ("start it with OMP_NUM_THREADS=1" in shown) == told


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cuda", 2)])
def test_where_fewer_threads_would_not_help_nobody_looks(device, threads, write_config, monkeypatch):
    def looks(began):
        raise AssertionError

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(setup, "load_since", looks)
    path = write_config(model={"device": "cpu"})
    assert setup.set_up(load_config(path), torch.device(device)).crowded is None
