"""The main job, end to end on a tiny model: what a run writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowrank
from lowrank.cli import main
from lowrank.config import load_config
from lowrank.errors import InputError, JobError
from lowrank.recipes.check import check
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.merge import merge_adapter
from lowrank.recipes.parts.less_memory import less_to_load, less_to_train
from lowrank.recipes.preview import preview

WRITTEN = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.yaml",
    "metrics.jsonl",
    "report.html",
    "logs",
    "checkpoints",
}


def test_the_base_is_not_evaluated_where_nobody_asks(write_config, capsys):
    result = lowrank.train(write_config(training={"eval_on_start": False}))
    assert result.before is None
    assert result.after is not None
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [result.steps]
    assert "loss per supervised token" in capsys.readouterr().out


def test_train_then_evaluate_then_merge(write_config, base, capsys):
    path = write_config(training={"predict_with_generate": True, "exact_match": "json", "generation_max_new_tokens": 8})
    result = lowrank.train(path)
    out = capsys.readouterr().out
    for word in ("LlamaForCausalLM", "segments", "all-linear 14", "supervised", "before", "after"):
        assert word in out
    assert {file.name for file in result.output_dir.iterdir()} == WRITTEN
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    measured = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "supervised_per_second", "peak_bytes"}
    assert all(line.keys() >= measured and 0 <= line["data_seconds"] < line["seconds"] for line in steps)
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [0, result.steps]
    assert all(line.keys() >= {"eval_loss", "eval_perplexity", "eval_exact_match"} for line in evaluations)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert result.after.loss < result.before.loss
    assert len(result.after.samples) == 6
    page = (result.output_dir / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert not re.search(r"(src|href|url)\W{1,3}https?:", page)  # nothing is fetched

    again = evaluate(path, adapter=result.output_dir)
    assert again.loss == pytest.approx(result.after.loss, rel=1e-6)
    assert [s.answer for s in again.samples] == [s.answer for s in result.after.samples]

    merge_adapter(result.output_dir, "merged", base)
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    adapted = lowrank.load(transformers.AutoModelForCausalLM.from_pretrained(base), result.output_dir)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
    assert main_exit(["chat", "merged", "--prompt", "say 3", "--max-new-tokens", "4"]) == 0


def main_exit(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    return int(exited.value.code or 0)


@pytest.mark.parametrize("method", ["dora", "adalora", "full"])
def test_other_methods(write_config, base, method):
    adapter = {"dora": {"method": "dora"}, "adalora": {"method": "adalora", "init_r": 4, "target_r": 2}}
    path = write_config(adapter=adapter.get(method, {"method": "full"}))
    text = path.read_text().replace("  r: 4\n", "") if method != "dora" else path.read_text()
    if method == "full":
        text = text.replace("  lora_alpha: 8\n", "")
    path.write_text(text)
    result = lowrank.train(path, ["training.learning_rate=1e-3", "training.tokens_per_batch=128"])
    assert result.after.loss < result.before.loss
    if method == "full":
        tuned = transformers.AutoModelForCausalLM.from_pretrained(result.output_dir)
        before = transformers.AutoModelForCausalLM.from_pretrained(base)
        assert not torch.equal(tuned.lm_head.weight, before.lm_head.weight)


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_same_seed_gives_the_same_bytes(write_config):
    path = write_config(adapter={"lora_dropout": 0.1})
    first = lowrank.train(path, ["training.output_dir=a"]).output_dir / "adapter_model.safetensors"
    second = lowrank.train(path, ["training.output_dir=b"]).output_dir / "adapter_model.safetensors"
    other = lowrank.train(path, ["training.output_dir=c", "training.seed=7"]).output_dir / "adapter_model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_how_a_step_is_cut_into_batches_does_not_matter(write_config):
    """All 24 rows in one step: as one padded batch, as three accumulated ones, as packs."""
    path = write_config(training={"num_train_epochs": 3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0})
    one = ["data.packing=false", "training.per_device_train_batch_size=24", "training.output_dir=one"]
    three = [
        "data.packing=false",
        "training.per_device_train_batch_size=8",
        "training.gradient_accumulation_steps=3",
        "training.output_dir=three",
    ]
    packs = ["training.gradient_accumulation_steps=99", "training.output_dir=packs"]
    runs = [lowrank.train(path, overrides) for overrides in (one, three, packs)]
    assert [run.steps for run in runs] == [3, 3, 3]
    expected, *others = (adapter_of(run.output_dir) for run in runs)
    for adapter in others:
        for name, tensor in adapter.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing(write_config):
    path = write_config()
    plain = adapter_of(lowrank.train(path, ["training.output_dir=a"]).output_dir)
    cut = adapter_of(lowrank.train(path, ["training.output_dir=b", "training.gradient_checkpointing=true"]).output_dir)
    for name, tensor in cut.items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-6, rtol=1e-5)


def test_ctrl_c_once_stops_after_the_step_and_saves(write_config, capsys):
    path = write_config(training={"num_train_epochs": 2000})
    threading.Timer(4.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    result = lowrank.train(path)
    assert result.interrupted
    assert 0 < result.steps < 2000
    assert {file.name for file in result.output_dir.iterdir()} >= WRITTEN
    assert f"stopped after step {result.steps}" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_told_before_anything_is_written(write_config, tmp_path, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lowrank.recipes.parts.beginning.rehearse", short)
    with pytest.raises(JobError, match="trying the longest batch") as raised:
        lowrank.train(write_config(), ["training.tokens_per_batch=200"])
    for help_with_numbers in (
        "training.tokens_per_batch below 200 (data.max_length is 128)",
        "training.gradient_checkpointing: true",
        "quantization.load_in_4bit: true",
    ):
        assert help_with_numbers in str(raised.value)
    assert not (tmp_path / "out").exists()
    padded = load_config(write_config(data={"packing": False}), ["training.gradient_checkpointing=true"])
    assert less_to_train(padded) == ["training.per_device_train_batch_size below 8", "quantization.load_in_4bit: true"]


def test_offloading_is_advised_where_it_can_be(write_config):
    path, advice = write_config(), "training.offload: layers"
    assert advice in less_to_load(load_config(path))
    for other in (
        "training.offload=layers",
        "training.fsdp=true",
        "adapter={method: full}",
        "quantization.load_in_4bit=true",
    ):
        assert advice not in less_to_load(load_config(path, [other]))


def test_a_base_that_does_not_fit_is_told(write_config, tmp_path, monkeypatch):
    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lowrank.recipes.parts.setup.base_model", short)
    with pytest.raises(JobError, match=r"loading the model.*\n.*load_in_4bit"):
        lowrank.train(write_config())
    assert not (tmp_path / "out").exists()


class TestRefusals:
    def test_a_folder_that_holds_a_run(self, write_config, tmp_path):
        path = write_config()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.yaml").write_text("mine")
        with pytest.raises(InputError, match="out holds a run already"):
            lowrank.train(path)
        assert (tmp_path / "out" / "config.yaml").read_text() == "mine"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.train=none.jsonl", "none.jsonl"),
            ("model.name_or_path=./nowhere", "there is no model folder ./nowhere"),
            ("adapter.target_modules=[q_porj]", "q_proj"),
            ("model.attention=flash", "flash"),
        ],
    )
    def test_what_is_not_there(self, write_config, tmp_path, override, message, capsys):
        path = write_config()
        assert main_exit(["train", str(path), "--set", override]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()

    def test_a_launcher_that_would_divide_the_gradients(self, write_config, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        with pytest.raises(InputError, match=r"Set training\.gradient_accumulation_steps"):
            lowrank.train(write_config())
        assert not (tmp_path / "out").exists()

    def test_a_row_without_an_answer(self, write_config, tmp_path):
        path = write_config()
        rows = (tmp_path / "train.jsonl").read_text().splitlines()
        rows[4] = json.dumps({"messages": [{"role": "user", "content": "hello?"}]})
        (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
        with pytest.raises(InputError, match=r"train.jsonl:5.*assistant"):
            lowrank.train(path)
        assert not (tmp_path / "out").exists()

    def test_an_answer_that_is_not_json_where_json_is_compared(self, write_config, tmp_path):
        path = write_config(training={"predict_with_generate": True, "exact_match": "json"})
        rows = [{"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "one"}]}]
        (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match="the answer of example 1 is not JSON: 'one'"):
            lowrank.train(path)
        assert not (tmp_path / "out").exists()


def test_check_does_everything_but_train(write_config, tmp_path, capsys):
    path = write_config()
    memory = check(path)
    assert min(memory.program, memory.weights, memory.training, memory.rest) > 0
    assert memory.total >= memory.program + memory.weights + memory.training
    assert "the run can start" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="matches no module"):
        check(path, ["adapter.target_modules=[nope]"])


def test_preview_in_the_terminal_and_as_a_page(write_config, tmp_path, capsys):
    path = write_config()
    preview(path, row=3)
    assert '{"n": 2}' in capsys.readouterr().out.replace("\n", "")
    preview(path, html="page.html")
    assert "<html" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match=r"page.html exists already"):
        preview(path, html="page.html")
    with pytest.raises(InputError, match="there is no row 99"):
        preview(path, row=99)


def test_evaluation_rows_set_aside_and_sources_mixed(write_config):
    path = write_config(
        data={"eval": 0.25, "train": [{"path": "train.jsonl", "weight": 3.0}, {"path": "eval.jsonl", "weight": 1.0}]}
    )
    result = lowrank.train(path, ["training.max_steps=1"])
    assert result.after.supervised > 0


def test_a_warm_up_that_is_longer_than_the_run_is_told(write_config, capsys):
    path = write_config(training={"warmup_steps": 50, "max_steps": 1})
    for job in (check, lowrank.train):
        job(path)
        assert "warning" in (out := capsys.readouterr().out)
        assert "the warm-up of 50 steps is not over within the run's 1 step" in out
    assert "not over within" in (path.parent / "out" / "report.html").read_text()
