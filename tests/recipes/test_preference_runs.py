"""Runs that learn from preferences: exact however their rows lie in batches, resumed, shared, evaluated, refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from processes import start_ranks
from safetensors.torch import load_file
from tiny import tiny_gemma2, tiny_gpt2

import lowrank
from lowrank.errors import InputError
from lowrank.recipes.check import check
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.init import init
from lowrank.recipes.parts import reference
from lowrank.recipes.preview import preview
from lowrank.training.callbacks.metrics_file import read_metrics

ADAPTER = "adapter_model.safetensors"


def pairs(count: int, offset: int = 0) -> list[dict]:
    """The answer as JSON is the better one."""
    return [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": json.dumps({"n": i})}],
            "rejected": [{"role": "assistant", "content": f"it is {i}{'!' * (i % 4)}"}],
        }
        for i in range(offset, offset + count)
    ]


def ratings(count: int, offset: int = 0) -> list[dict]:
    return [
        {"prompt": f"say {i}", "completion": f" {i}" * (1 + i % 3), "label": i % 2 == 0}
        for i in range(offset, offset + count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def write_preferences(write_config, tmp_path, monkeypatch):
    """Writes rows of preferences and the config of a short run on them."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))

    def written(objective="dpo", name="run.yaml", **sections):
        rows = ratings if objective == "kto" else pairs
        write(tmp_path / "train.jsonl", rows(12))
        write(tmp_path / "eval.jsonl", rows(4, 100))
        training = {"objective": objective, "learning_rate": 1e-3, **sections.pop("training", {})}
        return write_config(name, training=training, **sections)

    return written


def adapter_of(folder):
    return load_file(folder / ADAPTER)


def assert_same(one, other, atol):
    first, second = adapter_of(one), adapter_of(other)
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], atol=atol, rtol=0, msg=lambda told, name=name: f"{name}: {told}"
        )


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_batches_do_not_change_what_is_learned(write_preferences, tmp_path, objective):
    """One pack of all rows, several packs in a step, prompts computed for each answer, padded rows: the same adapter."""
    path = write_preferences(objective, training={"num_train_epochs": 3, "adam_epsilon": 1e-4})
    whole = "training.tokens_per_batch=2048"
    lowrank.train(path, ["training.output_dir=whole", whole])
    steps = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if line["kind"] == "step"]
    ways = {
        "packs": ["training.tokens_per_batch=128", "training.gradient_accumulation_steps=50"],
        "apart": ["data.share_prefixes=false", whole],
        "rows": ["data.packing=false", "training.per_device_train_batch_size=12"],
    }
    for name, changed in ways.items():
        lowrank.train(path, [f"training.output_dir={name}", *changed])
        found = [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "step"]
        assert len(found) == len(steps) == 3
        for key in ("loss", "accuracy", "margin"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in steps], abs=1e-5)
        assert_same(tmp_path / "whole", tmp_path / name, 1e-5)


@pytest.mark.parametrize("build", [tiny_gemma2, tiny_gpt2], ids=lambda one: one.__name__[5:])
def test_over_architectures(write_preferences, tmp_path, base, build):
    shutil.copytree(base, tmp_path / "other")
    build().save_pretrained(tmp_path / "other")
    model = {"name_or_path": str(tmp_path / "other")}
    path = write_preferences(model=model, training={"max_steps": 2, "adam_epsilon": 1e-4})
    lowrank.train(path, ["training.output_dir=packs", "training.tokens_per_batch=2048"])
    lowrank.train(
        path,
        [
            "training.output_dir=rows",
            "data.packing=false",
            "training.per_device_train_batch_size=12",
            "model.attention=eager",
        ],
    )
    assert_same(tmp_path / "packs", tmp_path / "rows", 1e-5)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_resumed_run_is_the_same_to_the_byte(write_preferences, tmp_path, objective):
    training = {"num_train_epochs": 2, "eval_steps": 2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    path = write_preferences(objective, adapter={"lora_dropout": 0.1}, training=training)
    lowrank.train(path, ["training.output_dir=whole", "training.max_steps=6"])
    lowrank.train(path, ["training.max_steps=3"])
    lowrank.train(path, ["training.max_steps=6"], resume=True)
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (tmp_path / "out" / ADAPTER).read_bytes()


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_two_processes_train_what_one_does(write_preferences, tmp_path, objective):
    path = write_preferences(objective, training={"adam_epsilon": 1e-4})
    lowrank.train(path, ["training.output_dir=alone", "training.gradient_accumulation_steps=2"])
    processes = start_ranks(tmp_path, ["train", str(path)], 2)
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "out.txt").read_text()
    assert_same(tmp_path / "alone", tmp_path / "out", 1e-5)


def test_it_learns_and_eval_says_so(write_preferences, tmp_path, capsys):
    path = write_preferences(
        training={"num_train_epochs": 8, "learning_rate": 1e-2, "predict_with_generate": True, "eval_steps": 4}
    )
    result = lowrank.train(path)
    assert result.before.scores["accuracy"] == 0.0
    assert result.before.loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.after.scores["accuracy"] == 1.0
    assert result.after.scores["reward_chosen"] - result.after.scores["reward_rejected"] == pytest.approx(
        result.after.scores["margin"], abs=1e-5
    )
    assert len(result.after.samples) == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Rewards" in page
    assert "Share of answers told apart" in page
    again = evaluate(path, tmp_path / "out")
    assert again.scores == pytest.approx(result.after.scores, abs=1e-5)
    assert again.loss == pytest.approx(result.after.loss, abs=1e-6)


def test_the_reference_is_asked_once_and_proved(write_preferences, tmp_path, base, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    path = write_preferences(model={"name_or_path": str(tmp_path / "base")})
    asked = []
    every = reference._Asked.all
    monkeypatch.setattr(reference._Asked, "all", lambda self, advance: asked.append(1) or every(self, advance))
    lowrank.train(path, ["training.output_dir=first"])
    assert len(asked) == 2  # the rows to train on, and those held out
    lowrank.train(path, ["training.output_dir=second", "training.beta=0.1"])
    assert len(asked) == 2
    assert_same(tmp_path / "first", tmp_path / "second", 0.0)
    kept = sorted((tmp_path / "cache" / "reference").glob("*.npy"))
    for place in kept:  # of another model, say
        np.save(place, np.load(place) + 1.0)
    lowrank.train(path, ["training.output_dir=third"])
    assert len(asked) == 4
    assert_same(tmp_path / "first", tmp_path / "third", 0.0)


def test_going_on_from_an_adapter(write_preferences, write_config, tmp_path):
    """What answers are compared with is the model as training begins, or the base."""
    write(tmp_path / "sft.jsonl", [{"messages": [*row["prompt"], *row["chosen"]]} for row in pairs(12)])
    lowrank.train(write_config("sft.yaml", data={"train": "sft.jsonl", "eval": None}, training={"output_dir": "sft"}))
    path = write_preferences(model={"adapter": "sft"}, adapter={}, training={"max_steps": 2})
    config = path.read_text().replace("adapter:\n  lora_alpha: 8\n  r: 4\n", "")
    path.write_text(config)
    lowrank.train(path)
    lowrank.train(path, ["training.output_dir=held", "training.reference=base"])
    own, held = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "held"))
    assert own[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert held[1]["loss"] < math.log(2) - 0.01  # the chosen answers are likelier than under the base
    begun, now = adapter_of(tmp_path / "sft"), adapter_of(tmp_path / "out")
    assert begun.keys() == now.keys()
    assert evaluate(path, tmp_path / "out").scores["logp_chosen"] < 0
    with pytest.raises(InputError, match="the section adapter is not what sft is"):
        lowrank.train(path, ["adapter.r=2", "training.output_dir=other"])


def test_every_weight(write_preferences, tmp_path):
    result = lowrank.train(write_preferences(training={"max_steps": 2}))
    assert result.steps == 2


def test_check_and_preview_show_both_answers(write_preferences, capsys):
    path = write_preferences()
    check(path)
    told = capsys.readouterr().out
    assert "dpo (sigmoid), from hidden states" in told
    preview(path, row=2)
    told = capsys.readouterr().out
    assert "chosen rejected" in told
    assert "it is 1!" in told


REFUSED = {
    "beta": (["training.objective=sft", "training.beta=0.2"], "training.beta.*does nothing for sft"),
    "gamma": (["training.simpo_gamma=0.2"], "training.simpo_gamma.*does nothing for dpo"),
    "type": (["training.loss_type=kto"], "dpo has sigmoid, hinge, robust, apo_zero, apo_down, and not kto"),
    "smoothing": (["training.loss_type=hinge", "training.label_smoothing=0.1"], "does nothing for hinge"),
    "reference": (["training.reference=adapter"], "there is no adapter to begin with"),
    "streaming": (["data.streaming=true", "training.max_steps=2"], "dpo reads all rows before it begins"),
    "train_on": (["data.train_on=all"], "data.train_on.*does nothing for dpo"),
    "metric": (
        ["training.metric_for_best_model=f1", "training.load_best_model_at_end=true", "training.eval_steps=1"],
        "dpo does not measure f1",
    ),
    "task": (["model.task=embedding"], "learns from answers of a causal language model"),
    "no pairs": (["data.train=plain.jsonl"], "the row has no chosen and rejected"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(write_preferences, tmp_path, changed, message):
    write(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(InputError, match=f"(?s){message}"):
        lowrank.train(write_preferences(), changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_init_writes_what_the_rows_are_for(write_preferences, tmp_path, base, objective):
    write_preferences(objective)
    path = init("train.jsonl", base, "proposed.yaml", held_out="eval.jsonl", checked=False)
    assert f"objective: {objective}" in path.read_text()
    result = lowrank.train(path, ["training.max_steps=1", "training.output_dir=proposed"])
    assert "accuracy" in result.after.scores
