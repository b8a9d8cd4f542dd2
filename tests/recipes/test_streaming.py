"""A run over a stream: deterministic, resumable, and refused where it would need to know all rows."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from short_run import chats

import lowrank
from lowrank.config import load_config
from lowrank.errors import InputError
from lowrank.training.run import Callback

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def streamed(write_config, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(30)))
    return write_config(
        adapter={"lora_dropout": 0.1},
        data={"streaming": True, "max_length": 64},
        training={"max_steps": 25, "gradient_accumulation_steps": 2, "save_steps": 4, "eval_steps": 10},
    )


class Interrupt(Callback):
    def on_step_end(self, run, metrics) -> None:
        if run.step == 19:
            os.kill(os.getpid(), signal.SIGINT)


def test_it_learns_and_resumes_to_the_bit(streamed, capsys):
    straight = lowrank.train(streamed, ["training.output_dir=straight"])
    told = capsys.readouterr().out
    assert "streamed from train.jsonl" in told
    assert re.search(r"From the stream: \d+ rows read\.", told)
    assert straight.after.loss < straight.before.loss
    steps = [json.loads(line) for line in (straight.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("epoch", 0) for line in steps) >= 1  # the stream begins again where it ends
    assert lowrank.train(streamed, callbacks=[Interrupt()]).steps == 19
    resumed = lowrank.train(streamed, resume=True)
    assert resumed.steps == 25
    assert (resumed.output_dir / ADAPTER).read_bytes() == (straight.output_dir / ADAPTER).read_bytes()


@pytest.mark.parametrize("packing", ["true", "false"])
def test_tokens_make_a_step(streamed, packing):
    text = streamed.read_text().replace("  gradient_accumulation_steps: 2\n", "")
    streamed.write_text(text)
    overrides = ["training.tokens_per_step=150", "training.max_steps=6", f"data.packing={packing}"]
    if packing == "false":
        overrides.append("training.per_device_train_batch_size=2")
    result = lowrank.train(streamed, overrides)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    sizes = [line["tokens"] for line in lines if line["kind"] == "step"]
    assert len(sizes) == 6
    assert all(75 < size <= 150 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=-1", "a stream does not say how long it is"),
        ("data.eval=0.1", "cannot be set aside from a stream"),
        ("data.max_train_rows=5", "where a stream ends"),
        ("adapter.init_lora_weights=eva", "a stream has none yet"),
    ],
)
def test_what_needs_all_rows_is_refused(streamed, override, message):
    with pytest.raises(InputError, match=message):
        load_config(streamed, [override])


def test_a_row_that_fits_none_is_named_when_it_is_reached(streamed, tmp_path):
    rows = [json.dumps(row) for row in chats(700)]
    rows[650] = json.dumps({"something": "else"})
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"train.jsonl:651"):
        lowrank.train(streamed, ["training.max_steps=400"])
