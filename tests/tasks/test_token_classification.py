"""Tags for words: which tokens they sit on, the loss against transformers, figures against seqeval, a run's whole way."""

from __future__ import annotations

import re

import numpy as np
import peft
import pytest
import torch
import transformers as t
from labelled import BASES, tagged
from seqeval.metrics import f1_score
from tiny import tiny_tokenizer

import lowrank
from lowrank.errors import InputError
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.merge import merge_adapter
from lowrank.recipes.predict import predict
from lowrank.recipes.preview import preview
from lowrank.tasks.encoding import encoded_words
from lowrank.tasks.labels import SINGLE, Labels
from lowrank.tasks.measures import tag_scores
from lowrank.tasks.token_classification import Tagger

ADAPTER = "adapter_model.safetensors"
NAMES = ("B-LOC", "B-PER", "I-PER", "O")
TAGS = ["O", "B-PER", "I-PER"]


def test_a_tag_sits_on_the_first_token_of_its_word():
    words = ["see", "Änne", "B"]
    ids, marks, cut = encoded_words(words, tiny_tokenizer(None), None)
    assert not cut
    firsts = tiny_tokenizer(None).convert_ids_to_tokens(ids[marks])
    assert [one in ("s", "Ġ", "Ã", "B") for one in firsts] == [True] * 3
    assert int(marks.sum()) == 3
    _, marks, cut = encoded_words(words, tiny_tokenizer(None), 5)
    assert cut
    assert int(marks.sum()) == 2


@pytest.mark.parametrize("name", BASES)
def test_the_loss_is_transformers_own(bases, name):
    task = Tagger(Labels(SINGLE, NAMES))
    torch.manual_seed(1)
    pad = 1 if name == "roberta" else 0
    model = t.AutoModelForTokenClassification.from_pretrained(bases(name), **task.settings, pad_token_id=pad).eval()
    rows = [encoded_words(words, tiny_tokenizer(None), None) for words in (["see", "Anna", "Berg"], ["a", "b", "c"])]
    batch = task.collate([row[:2] for row in rows], [TAGS, TAGS], pad)
    labels = torch.full_like(batch.input_ids, -100)
    for number, (_, marks, _) in enumerate(rows):
        labels[number, np.flatnonzero(marks)] = torch.tensor([NAMES.index(tag) for tag in TAGS])
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    torch.testing.assert_close(task.loss()(model, batch) / batch.supervised, expected, atol=1e-6, rtol=1e-5)


def test_the_figures_are_seqevals():
    expected, predicted = [["B-PER", "I-PER", "O"], ["O", "B-LOC"]], [["B-PER", "O", "O"], ["O", "B-LOC"]]
    assert tag_scores(expected, predicted)["f1"] == f1_score(expected, predicted) == 0.5
    assert tag_scores([["a", "b"]], [["a", "a"]]).keys() == {"f1", "accuracy"}


@pytest.mark.parametrize("name", ["bert", "deberta", "llama"])
def test_a_run_from_config_to_merged_model_and_through_peft(write_task, bases, name, capsys):
    path = write_task(name, tagged(16), tagged(4, 20), training={"num_train_epochs": 2})
    result = lowrank.train(path)
    assert result.after.scores.keys() == {"f1", "precision", "recall", "accuracy"}
    model = t.AutoModelForTokenClassification.from_pretrained(bases(name), num_labels=4, pad_token_id=0).eval()
    theirs = peft.PeftModel.from_pretrained(model, "out").eval()
    merge_adapter("out")
    merged = t.AutoModelForTokenClassification.from_pretrained("out-merged").eval()
    assert merged.config.id2label == dict(enumerate(NAMES))
    ids = tiny_tokenizer(None)("see Anna", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(merged(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    assert predict("out", texts=["see Anna"])[0].said == predict("out-merged", texts=["see Anna"])[0].said
    assert result.after.supervised == 20  # five words in each of four rows
    again = evaluate("out", "out")
    assert again.scores == pytest.approx(result.after.scores)
    assert again.loss == pytest.approx(result.after.loss, abs=1e-5)
    capsys.readouterr()
    preview(path, row=1)
    assert "label O B-PER I-PER O B-LOC" in capsys.readouterr().out.replace("\n", " ")


def test_what_peft_saves_is_read(bases, tmp_path):
    model = t.AutoModelForTokenClassification.from_pretrained(bases("bert"), num_labels=4)
    config = peft.LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["query"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    ids = tiny_tokenizer(None)("see Anna", return_tensors="pt")["input_ids"]
    fresh = t.AutoModelForTokenClassification.from_pretrained(bases("bert"), num_labels=4).eval()
    found = lowrank.load(fresh, tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(found, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_is_the_same_to_the_byte(write_task, tmp_path):
    path = write_task("bert", tagged(16), tagged(4), training={"lr_scheduler_type": "constant"})
    lowrank.train(path, ["training.output_dir=whole"])
    lowrank.train(path, ["training.max_steps=3"])
    lowrank.train(path, ["training.max_steps=4"], resume=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "train.jsonl:5: tokens and tags are not two lists of the same length"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "train.jsonl:5: token 2 is ''"),
    ],
)
def test_rows_that_are_no_such(write_task, row, told):
    with pytest.raises(InputError, match=re.escape(told)):
        lowrank.train(write_task("bert", [*tagged(4), row], tagged(4)))
    with pytest.raises(InputError, match=re.escape("eval.jsonl:1: the tag 'X' is none")):
        lowrank.train(write_task("bert", tagged(4), [{"tokens": ["a"], "tags": ["X"]}]))
