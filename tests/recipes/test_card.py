"""The card of a run's adapter: what the hub reads of it, what it says is true, and whose it is."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import lowrank
from lowrank.config import RunConfig, load_config
from lowrank.recipes.parts.model_card import license_of, write_card
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.weights.cards import FILE, is_made

BASE_CARD = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# Base\n"


def test_the_hub_reads_it_and_the_figures_are_the_runs(write_config):
    result = lowrank.train(write_config(training={"predict_with_generate": True, "generation_max_new_tokens": 4}))
    text = (result.output_dir / FILE).read_text()
    assert is_made(text)
    data = ModelCard(text).data
    assert (data.library_name, data.tags, data.model_name) == ("peft", ["lowrank", "lora"], "out")
    assert data.base_model is None  # a folder of this machine is no name on the hub
    found = {entry.metric_type: entry.metric_value for entry in data.eval_results}
    assert found == {
        name: pytest.approx(getattr(result.after, name), abs=1e-6) for name in ("loss", "perplexity", "exact_match")
    }
    assert data.eval_results[0].dataset_name == "eval.jsonl"
    for part in ("train.jsonl: 24 rows", "r = 4", f"{result.before.loss:.4f} | {result.after.loss:.4f} |"):
        assert part in text
    assert str(result.output_dir.resolve().parent) not in text


@pytest.mark.parametrize(
    ("adapter", "ways"),
    [({}, 3), ({"method": "dora"}, 2), ({"use_dora": True}, 2), ({"method": "adalora", "r": None, "target_r": 2}, 2)],
)
def test_each_way_of_use_that_it_shows_gives_the_same_logits(write_config, base, tmp_path, adapter, ways):
    values = {key: value for key, value in {"r": 4, **adapter}.items() if value is not None}
    path = write_config(training={"max_steps": 6})
    result = lowrank.train(RunConfig.model_validate({**load_config(path).model_dump(mode="json"), "adapter": values}))
    ids = torch.arange(3, 19)[None]
    reference = lowrank.load(AutoModelForCausalLM.from_pretrained(base), result.output_dir)
    plain = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / base.name).symlink_to(base)
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (result.output_dir / FILE).read_text(), re.DOTALL)
    assert len(blocks) == ways
    with torch.no_grad():
        expected = reference(ids).logits
        assert (expected - plain(ids).logits).abs().max() > 1e-3
        for block in blocks:
            exec(block, scope)
            torch.testing.assert_close(scope["model"].eval()(ids).logits, expected, atol=1e-5, rtol=0)


def test_a_persons_card_stays_and_ours_is_brought_up_to_date(write_config, capsys):
    path = write_config(training={"max_steps": 1, "lr_scheduler_type": "constant"})
    folder = lowrank.train(path).output_dir
    first = (folder / FILE).read_text()
    longer = ["training.max_steps=2"]
    lowrank.train(path, longer, resume=True)
    second = (folder / FILE).read_text()
    assert first != second
    assert is_made(second)
    (folder / FILE).write_text(second + "I wrote this.\n")
    lowrank.train(path, ["training.max_steps=3"], resume=True)
    assert (folder / FILE).read_text() == second + "I wrote this.\n"
    assert "by a person: it stays" in capsys.readouterr().out


def test_no_evaluation_no_figures(write_config):
    folder = lowrank.train(write_config(data={"eval": None}, training={"max_steps": 1})).output_dir
    text = (folder / FILE).read_text()
    assert ModelCard(text).data.eval_results is None
    assert "Results" not in text


def test_a_base_on_the_hub_is_named_with_its_revision(tmp_path):
    model = {"name_or_path": "someone/base", "revision": "v2"}
    config = RunConfig.model_validate(
        {"model": model, "data": {"train": "/data/b.jsonl", "eval": "/data/c.jsonl"}, "training": {"output_dir": "o"}}
    )
    summary = dict.fromkeys(("adapter", "trainable", "dtype", "batches", "steps"), "told | so\nhere")
    assert write_card(tmp_path, config, summary, "7 rows", None, Evaluation(0.5, 10))
    text = (tmp_path / FILE).read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/base", "adapter")
    assert text.count('from_pretrained("someone/base", revision="v2")') == 3
    assert "| b.jsonl: 7 rows |" in text
    assert "told \\| so<br>here" in text


def test_the_license_is_the_bases(tmp_path):
    assert license_of(str(tmp_path), None) == {}
    (tmp_path / FILE).write_text(BASE_CARD)
    assert license_of(str(tmp_path), None) == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    for strange in ("---\nlicense: [\n---\n", "no front matter", "---\nlicense: [a, b]\n---\n", "---\n- a list\n---\n"):
        (tmp_path / FILE).write_text(strange)
        assert license_of(str(tmp_path), None) == {}
    assert license_of("nobody/nothing", None) == {}
