"""What a person is told about rows, labels and configs that make no task."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from labelled import rows

import lowrank
from lowrank.errors import InputError
from lowrank.recipes.chat import chat
from lowrank.recipes.compare import compare
from lowrank.recipes.predict import predict
from lowrank.weights.files.adapter_file import open_adapter

CASES = {
    "another label": (rows(6), [{"text": "a", "label": "new"}], {}, "eval.jsonl:1: the label 'new' is none of those"),
    "one class": ([{"text": "a", "label": "x"}] * 3, rows(3), {}, "train.jsonl: all rows have the label 'x'"),
    "no text": ([*rows(3), {"text": " ", "label": "pos"}], rows(3), {}, "train.jsonl:4: 'text' is empty"),
    "no label": ([*rows(3), {"text": "a"}], rows(3), {}, "train.jsonl:4: the row has no label"),
    "no label at first": ([{"text": "a", "label": None}, *rows(3)], rows(3), {}, "train.jsonl:1: the row has no label"),
    "no label anywhere": (
        [{"text": "a", "label": None}] * 3,
        rows(3),
        {"model": {"task": "sequence_classification"}},
        "train.jsonl:1: the row has 'text', and model.task is sequence_classification",
    ),
    "mixed labels": ([*rows(3), {"text": "a", "label": 0.5}], rows(3), {}, "train.jsonl:4: the label is 0.5"),
    "a number among names": ([*rows(3), {"text": "a", "label": 1}], rows(3), {}, "train.jsonl:4: the label is '1'"),
    "a name among numbers": (
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": "one"}],
        rows(3),
        {},
        "train.jsonl:3: the label is 'one', and most are whole numbers such as '0'",
    ),
    "no such rows": (
        [{"prompt": "a", "completion": "b"}] * 3,
        rows(3),
        {"model": {"task": "sequence_classification"}},
        "train.jsonl:1: the row has 'prompt', 'completion', and model.task is sequence_classification",
    ),
    "packs": (rows(6), rows(3), {"model": {"task": "sequence_classification"}, "data": {"packing": True}}, "padded"),
    "a format": (rows(6), rows(3), {"model": {"task": "sequence_classification"}, "data": {"format": "text"}}, "nothing"),
    "a weight": (rows(6), rows(3), {"training": {"class_weights": {"nobody": 2.0}}}, "there is no label 'nobody'"),
    "exact match": (rows(6), rows(3), {"training": {"predict_with_generate": True}}, "does nothing for"),
    "weights of tags": (
        [{"tokens": ["a", "b"], "tags": ["x", "y"]}] * 3,
        rows(3),
        {"training": {"class_weights": {"x": 2.0}}},
        "training.class_weights: does nothing for token_classification",
    ),
    "smoothed pairs": (
        [{"anchor": "a", "positive": "b"}] * 3,
        rows(3),
        {"model": {"task": "embedding"}, "training": {"label_smoothing_factor": 0.1}},
        "does nothing for embedding",
    ),
    "too long": (rows(6), rows(3), {"data": {"max_length": 8}}, "rows are longer than data.max_length = 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_what_is_wrong_and_where(write_task, case):
    train, held_out, sections, told = CASES[case]
    with pytest.raises(InputError, match=re.escape(told)):
        lowrank.train(write_task("llama", train, held_out, **sections))


def test_numbers_and_names_are_classes_together_where_the_config_says_so(write_task):
    mixed = [{"text": text, "label": label} for text, label in (("a", 1), ("b", "one"), ("c", 0), ("d", 1))]
    asked = {"problem_type": "single_label_classification"}
    lowrank.train(write_task("llama", mixed, mixed, model=asked, training={"max_steps": 1}))
    assert list(open_adapter(Path("out")).head["id2label"].values()) == ["0", "1", "one"]


def test_an_architecture_without_such_a_model(write_task, tmp_path):
    import transformers
    from tiny import VOCAB, tiny_tokenizer

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GPTNeoXJapaneseConfig(**sizes)
    transformers.GPTNeoXJapaneseForCausalLM(config).save_pretrained(tmp_path / "other")
    tiny_tokenizer(None).save_pretrained(tmp_path / "other")
    path = write_task("llama", model={"name_or_path": str(tmp_path / "other")})
    with pytest.raises(
        InputError, match="is a gpt_neox_japanese, of which transformers has no model for sequence_classification"
    ):
        lowrank.train(path)


def test_a_classifier_is_not_talked_to(write_task):
    lowrank.train(write_task("llama"), ["training.max_steps=1"])
    with pytest.raises(InputError, match="says no words\nAsk it with `lowrank predict out`"):
        chat("out")
    with pytest.raises(InputError, match="says no words"):
        compare(["out"], prompts=["hi"])
    with pytest.raises(InputError, match="--text 2: 'text' is empty"):
        predict("out", texts=["a", " "])
    with pytest.raises(InputError, match="there is nothing to predict"):
        predict("out")


def test_rows_that_cannot_be_used_are_left_out_if_few(write_task, capsys):
    these = [*rows(30), {"text": "", "label": "pos"}]
    lowrank.train(write_task("llama", these, data={"bad_rows": "skip"}, training={"max_steps": 1}))
    assert "1 left out as bad" in capsys.readouterr().out
