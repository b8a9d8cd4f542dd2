"""Chat templates that write the day's date: a run keeps the date on which it began."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import yaml
from tiny import CHATML, tiny_llama, tiny_tokenizer

import lowrank
from lowrank.config import load_config
from lowrank.data import load_examples
from lowrank.data.supervision import template
from lowrank.errors import InputError
from lowrank.recipes.parts import resume
from lowrank.training.run import Callback

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + CHATML


class StopAfterTwo(Callback):
    def on_step_end(self, run, metrics):
        run.stop = run.interrupted = run.step == 2 or run.stop


@pytest.fixture
def days(monkeypatch):
    """Sets the day it is."""

    def is_now(day: str) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date.fromisoformat(day)

        for module in (template, resume):
            monkeypatch.setattr(module, "date", Day)

    return is_now


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tiny_tokenizer(chat_template=DATED).save_pretrained("base")
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(9)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model": {"name_or_path": "base"},
        "adapter": {"r": 2},
        "data": {"train": "rows.jsonl", "max_length": 128, "packing": False},
        "training": {"output_dir": "out", "max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2},
    }
    Path("run.yaml").write_text(yaml.safe_dump(run))
    return Path("run.yaml")


def test_a_run_that_is_resumed_on_the_next_day_keeps_its_date(config, days, capsys):
    days("2026-11-26")
    lowrank.train(config, ["training.output_dir=straight"])
    lowrank.train(config, callbacks=[StopAfterTwo()])
    assert "2026-11-26" in capsys.readouterr().out
    days("2026-11-27")
    assert lowrank.train(config, resume=True).steps == 4
    assert load_config("out/config.yaml").data.date == "2026-11-26"
    name = "adapter_model.safetensors"
    assert Path("out", name).read_bytes() == Path("straight", name).read_bytes()


def test_another_date_than_the_runs_is_refused(config, days):
    days("2026-11-26")
    lowrank.train(config, callbacks=[StopAfterTwo()])
    with pytest.raises(InputError, match=r"data\.date"):
        lowrank.train(config, ["data.date=2026-01-01"], resume=True)


def test_a_template_without_a_date_leaves_none_in_the_config(config):
    tiny_tokenizer().save_pretrained("base")
    lowrank.train(config, ["training.max_steps=1"])
    assert load_config("out/config.yaml").data.date is None


def test_the_date_that_rows_are_written_with():
    tokenizer = tiny_tokenizer(chat_template=DATED)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    (example,) = load_examples([row], tokenizer, max_length=100, today="2024-07-26")
    assert tokenizer.decode(example.input_ids).startswith("Today: 26 Jul 2024\n")


@pytest.mark.parametrize("day", ["2026-13-01", "2026-02-30", "0000-01-01"])
def test_a_day_that_is_none_is_refused(day):
    with pytest.raises(InputError, match=rf"data.date: '{day}' is no date; write one as 2026-11-26"):
        load_config({"model": {"name_or_path": "base"}, "data": {"train": "rows.jsonl", "date": day}})
