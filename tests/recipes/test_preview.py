"""`lowrank preview` on a config: its steps are the run's, and of a stream it reads the first rows alone."""

from __future__ import annotations

import json
import re

import pytest

import lowrank
from lowrank.cli import main
from lowrank.recipes.preview import preview


@pytest.mark.parametrize(
    "override",
    ["training.gradient_accumulation_steps=2", "training.tokens_per_step=150", "data.packing=false"],
)
def test_the_steps_of_an_epoch_are_those_of_the_run(write_config, capsys, override):
    path = write_config(data={"max_length": 64})
    preview(path, [override])
    shown = re.search(r"steps per epoch +(\d+)", capsys.readouterr().out)
    assert shown is not None
    assert int(shown[1]) == lowrank.train(path, [override, "training.num_train_epochs=1"]).steps


def test_the_steps_of_several_processes(write_config, capsys):
    path = write_config(data={"max_length": 64}, training={"num_processes": 2, "gradient_accumulation_steps": 2})
    preview(path)
    alone = ["training.num_processes=1", "training.gradient_accumulation_steps=4"]
    together = re.search(r"steps per epoch +(\d+)", capsys.readouterr().out)
    preview(path, alone)
    one = re.search(r"steps per epoch +(\d+)", capsys.readouterr().out)
    assert together is not None
    assert one is not None
    assert together[1] == one[1]


def test_of_a_stream_only_the_first_rows_are_read(write_config, tmp_path, capsys):
    path = write_config(data={"streaming": True}, training={"max_steps": 5})
    row = (tmp_path / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 500 + "{broken\n")
    preview(path)
    out = capsys.readouterr().out
    assert re.search(r"rows looked at, the first of a stream +500", out)
    preview(path, row=7)
    assert json.dumps({"n": 0}) in capsys.readouterr().out


def test_the_command_shows_one_row_and_writes_the_page(write_config, tmp_path, capsys):
    path = str(write_config())
    for more in (["--row", "3"], ["--row", "3", "--html", "page.html"]):
        with pytest.raises(SystemExit) as ended:
            main(["preview", path, *more])
        assert not ended.value.code
    out = capsys.readouterr().out
    assert "row 3, token by token" in out
    assert "train.jsonl:3" in out
    assert "wrote page.html" in out
    assert "train.jsonl:3" in (tmp_path / "page.html").read_text()
