"""Embeddings: the loss against the plain formula, figures by hand, peft both ways, a run's whole way."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers as t
from labelled import WORDS, write_rows
from processes import start_ranks
from safetensors.torch import load_file
from tiny import tiny_tokenizer

import lowrank
from lowrank.errors import InputError
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.merge import merge_adapter
from lowrank.recipes.predict import predict
from lowrank.tasks.measures import retrieval_scores
from lowrank.tasks.task import Wishes
from lowrank.tasks.text_embedding import Embedder, Embedding

ADAPTER = "adapter_model.safetensors"
ROWS = [
    {"anchor": "nice", "positive": "good", "negative": "bad"},
    {"anchor": "a b", "positive": "a longer text"},
    {"anchor": "ugly one", "positive": "awful", "negative": "lovely"},
]


def pairs(count: int, first: int = 0) -> list[dict]:
    """Words of one kind belong together."""
    kinds = [words.split() for words in WORDS.values()]
    found = []
    for i in range(first, first + count):
        words = kinds[i % 3]
        found.append({"anchor": f"{words[0]} {i}", "positive": f"{words[1]} {words[2]} {i}"})
    return found


def embedded(model, text):
    ids = tiny_tokenizer(None)(text, return_tensors="pt")["input_ids"]
    return torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(dim=1), dim=-1)[0]


def batch_of(rows, pad=0):
    encode = Embedding().encoder(Wishes())
    found = [encode(row, tiny_tokenizer(None), None) for row in rows]
    return Embedder().collate([(one.ids, one.marks) for one in found], [one.payload for one in found], pad)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "deberta", "llama"])
def test_the_loss_is_the_formulas(bases, name):
    model = t.AutoModel.from_pretrained(bases(name)).eval()
    batch = batch_of(ROWS, 1 if name == "roberta" else 0)
    anchors = torch.stack([embedded(model, row["anchor"]) for row in ROWS])
    others = [row["positive"] for row in ROWS] + [row["negative"] for row in ROWS if "negative" in row]
    scores = 20.0 * anchors @ torch.stack([embedded(model, text) for text in others]).t()
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(3))
    torch.testing.assert_close(Embedder().loss()(model, batch) / batch.supervised, expected, atol=2e-5, rtol=1e-5)


def test_an_equal_positive_of_another_row_is_not_taken_for_wrong(bases):
    model = t.AutoModel.from_pretrained(bases("bert")).eval()
    same = [{"anchor": "x", "positive": "good"}, {"anchor": "y", "positive": "good"}]
    assert float(Embedder().loss()(model, batch_of(same))) == 0.0


def test_the_figures_by_hand():
    """Of three rows the first finds its own, the second comes second; the third's equal anchor is not held against it."""
    anchors = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    positives = np.array([[0.9, 0.1], [0.1, 0.5], [0.8, 0.6]])
    scores = retrieval_scores(anchors, positives, [b"a", b"b", b"a"], [b"p", b"q", b"r"])
    assert scores["recall@1"] == pytest.approx(2 / 3)
    assert scores["recall@10"] == 1.0
    assert scores["ndcg@10"] == pytest.approx((2 + 1 / np.log2(3)) / 3)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_a_run_from_config_to_merged_model_and_through_peft(write_task, bases, tmp_path, name):
    result = lowrank.train(write_task(name, pairs(16), pairs(8, 30)))
    assert result.after.scores.keys() == {"recall@1", "recall@10", "ndcg@10"}
    assert result.after.loss < result.before.loss
    theirs = peft.PeftModel.from_pretrained(t.AutoModel.from_pretrained(bases(name)), "out").eval()
    merge_adapter("out")
    merged = t.AutoModel.from_pretrained("out-merged").eval()
    expected = embedded(theirs, "a nice text")
    torch.testing.assert_close(embedded(merged, "a nice text"), expected, atol=1e-5, rtol=1e-4)
    for folder in ("out", "out-merged"):
        said = torch.tensor(predict(folder, texts=["a nice text"], task="embedding")[0].vector)
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-4)
    again = evaluate("out", "out")
    assert (again.scores, again.loss) == (
        pytest.approx(result.after.scores),
        pytest.approx(result.after.loss, abs=1e-5),
    )
    write_rows(tmp_path / "ask.jsonl", [{"text": "a nice text"}])
    predict("out", file="ask.jsonl", out="said.jsonl")
    assert len(json.loads((tmp_path / "said.jsonl").read_text())["embedding"]) == 32


def test_what_peft_saves_is_read(bases, tmp_path):
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query"], init_lora_weights=False)
    theirs = peft.get_peft_model(t.AutoModel.from_pretrained(bases("bert")), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = lowrank.load(t.AutoModel.from_pretrained(bases("bert")).eval(), tmp_path)
    torch.testing.assert_close(embedded(ours, "nice"), embedded(theirs, "nice"), atol=1e-5, rtol=1e-4)


def test_a_resumed_run_is_the_same_to_the_byte_and_two_processes_train_what_one_does(write_task, tmp_path):
    path = write_task(
        "bert", pairs(32), pairs(6, 40), training={"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    )
    lowrank.train(path, ["training.output_dir=whole"])
    lowrank.train(path, ["training.output_dir=two", "training.max_steps=3"])
    lowrank.train(path, ["training.output_dir=two", "training.max_steps=8"], resume=True)
    assert (tmp_path / "two" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    lowrank.train(path, ["training.output_dir=alone", "training.gradient_accumulation_steps=2"])
    processes = start_ranks(tmp_path, ["train", str(path)], 2)
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "out.txt").read_text()
    together = load_file(tmp_path / "out" / ADAPTER)
    for key, tensor in load_file(tmp_path / "alone" / ADAPTER).items():
        torch.testing.assert_close(together[key], tensor, atol=1e-6, rtol=0)


def test_rows_that_are_no_pairs(write_task):
    with pytest.raises(InputError, match=r"train\.jsonl:3: 'positive' is empty"):
        lowrank.train(write_task("bert", [*pairs(2), {"anchor": "a", "positive": " "}]))
    with pytest.raises(InputError, match=r"train\.jsonl:3: anchor and positive are the same"):
        lowrank.train(write_task("bert", [*pairs(2), {"anchor": "a", "positive": "a"}]))
    with pytest.raises(InputError, match="there is one row, and no other"):
        lowrank.train(write_task("bert", pairs(1), pairs(3)))
