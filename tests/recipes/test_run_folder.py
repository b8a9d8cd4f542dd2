"""A run's folder is enough: for evaluation, on other data too, for talking as it was trained, for being checked again."""

from __future__ import annotations

import json

import pytest
import torch
from short_run import chats
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

import lowrank
from lowrank.cli import main
from lowrank.data import load_examples
from lowrank.data.supervision.shared_opening import shared_system
from lowrank.errors import InputError
from lowrank.recipes.chat import chat
from lowrank.recipes.check import check
from lowrank.recipes.train import train
from lowrank.weights.files.notes import noted_system

PROMPT = "Answer with the number as JSON."


def behind(rows: list[dict], system: str) -> list[dict]:
    return [{"messages": [{"role": "system", "content": system}, *row["messages"]]} for row in rows]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(write_config, tmp_path):
    """The folder of a run whose rows share a system prompt."""
    (tmp_path / "mine.jsonl").write_text(jsonl(behind(chats(24), PROMPT)))
    train(write_config(data={"train": "mine.jsonl"}, training={"max_steps": 2}))
    return tmp_path / "out"


def test_it_evaluates_itself_and_on_other_data(run, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text(jsonl(chats(4, 500)))
    for arguments, told in (
        (["eval", str(run)], "6 examples of eval.jsonl"),
        (["eval", str(run), "--data", "other.jsonl"], "4 examples of other.jsonl"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        said = " ".join(capsys.readouterr().out.split())
        assert f"{run} on {told}" in said


def test_chat_begins_as_it_was_trained(run, capsys):
    assert noted_system(run) == PROMPT
    as_trained = chat(str(run), prompts=["say 1"], max_new_tokens=4)
    assert PROMPT in capsys.readouterr().err
    assert chat(str(run), prompts=["say 1"], system=PROMPT, max_new_tokens=4) == as_trained
    chat(str(run), prompts=["say 1"], system="", max_new_tokens=4)
    assert PROMPT not in capsys.readouterr().err


def test_check_tells_of_the_run_and_of_all_else(run, capsys):
    with pytest.raises(InputError, match="out"):
        check(run)
    said = capsys.readouterr().out
    assert "memory" in said
    assert "the run can start" not in said


def test_python_loads_it_without_a_model(run, tmp_path):
    model = lowrank.load(run, adapter="mine", trainable=True)
    other = lowrank.load(AutoModelForCausalLM.from_pretrained(lowrank.load(run).config._name_or_path), run)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    assert lowrank.describe(model)["mine"].trainable
    for given, said in (((tmp_path,), "there is no adapter"), ((run, run), "is given beside"), ((model,), "not said")):
        with pytest.raises(InputError, match=said):
            lowrank.load(*given)


def test_a_notebook_shows_the_figures(write_config):
    result = train(write_config(training={"max_steps": 1}))
    shown = result._repr_html_()
    assert f"{result.after.loss:.4f}" in shown
    assert f'href="{result.output_dir}/report.html"' in shown


def test_what_nearly_all_share_is_shared():
    def of(rows: list[dict]) -> str | None:
        return shared_system(load_examples(rows, tiny_tokenizer(), max_length=256))

    assert of([*behind(chats(19), PROMPT), *chats(1)]) == PROMPT
    assert of([*behind(chats(10), PROMPT), *behind(chats(10), "Another one.")]) is None
    assert of(chats(5)) is None
    assert of([{"prompt": "1+1=", "completion": "2"}]) is None
