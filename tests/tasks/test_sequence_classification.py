"""Labels for texts: the loss and a whole run against transformers, adapters against peft, and back."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers as t
from labelled import BASES, rows, write_rows
from processes import start_ranks
from safetensors.torch import load_file
from tiny import tiny_tokenizer

import lowrank
from lowrank.recipes.check import check
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.init import init
from lowrank.recipes.merge import merge_adapter
from lowrank.recipes.predict import predict
from lowrank.recipes.preview import preview
from lowrank.tasks.labels import MULTI, REGRESSION, SINGLE, Labels
from lowrank.tasks.sequence_classification import Classifier, Payload

ADAPTER = "adapter_model.safetensors"
LABELS = {SINGLE: ["a", "c", "b"], MULTI: [("a", "c"), (), ("b",)], REGRESSION: [0.5, -1.0, 2.25]}
TEXTS = ["nice", "a longer text, of some words", "grey and flat"]


def encoded(texts):
    ids = [np.array(tiny_tokenizer(None)(text)["input_ids"], dtype=np.int32) for text in texts]
    return [(one, np.arange(len(one)) == len(one) - 1) for one in ids]


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("name", BASES)
def test_the_loss_is_transformers_own(bases, name, kind):
    task = Classifier(Labels(kind, () if kind == REGRESSION else ("a", "b", "c")))
    torch.manual_seed(1)
    model = t.AutoModelForSequenceClassification.from_pretrained(
        bases(name), **task.settings, pad_token_id=0 if name != "roberta" else 1
    ).eval()
    batch = task.collate(encoded(TEXTS), [Payload(label, None) for label in LABELS[kind]], model.config.pad_token_id)
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.given["labels"]).loss
    loss = task.loss()
    torch.testing.assert_close(loss(model, batch) / batch.supervised, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss.each(model, batch).mean(), expected.detach(), atol=1e-6, rtol=1e-5)


def test_weights_and_smoothing_are_torchs(bases):
    task = Classifier(Labels(SINGLE, ("a", "b", "c")), (1.0, 2.0, 0.5), 0.1)
    model = t.AutoModelForSequenceClassification.from_pretrained(bases("bert"), **task.settings).eval()
    batch = task.collate(encoded(TEXTS), [Payload(label, None) for label in LABELS[SINGLE]], 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(task.loss()(model, batch), loss(logits, torch.tensor([0, 2, 1])))
    assert not torch.equal(task.loss()(model, batch), task.loss(plain=True)(model, batch))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_whole_run_is_transformers_trainers(write_task, bases, tmp_path, name):
    """Every weight trains, three steps on one batch: the same weights come out."""
    path = write_task(
        name,
        rows(8),
        adapter={"method": "full"},
        model={"task": "sequence_classification"},
        data={"eval": None},
        training={"num_train_epochs": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
                  "optim": "adamw_torch", "per_device_train_batch_size": 8},
    )  # fmt: skip
    lowrank.train(path)
    names = ["neg", "plain", "pos"]
    t.set_seed(42)
    model = t.AutoModelForSequenceClassification.from_pretrained(bases(name), num_labels=3, pad_token_id=0)
    tokenizer = tiny_tokenizer(None)
    data = [{**tokenizer(row["text"]), "label": names.index(row["label"])} for row in rows(8)]
    options = t.TrainingArguments(
        str(tmp_path / "theirs"), num_train_epochs=3, learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True,
        per_device_train_batch_size=8, report_to="none", save_strategy="no", optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    collator = t.DataCollatorWithPadding(tokenizer)
    t.Trainer(model, options, train_dataset=data, data_collator=collator).train()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in model.state_dict().items():
        if key in ours:
            torch.testing.assert_close(
                ours[key], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {
        "0": "neg",
        "1": "plain",
        "2": "pos",
    }


@pytest.mark.parametrize("name", BASES)
def test_a_run_from_config_to_merged_model_and_through_peft(write_task, bases, name, capsys):
    """What lowrank trains peft reads, and says the same; so does what it merges, and what predicts."""
    result = lowrank.train(write_task(name, training={"num_train_epochs": 1}))
    assert result.after.scores.keys() == {"accuracy", "f1", "mcc"}
    model = t.AutoModelForSequenceClassification.from_pretrained(bases(name), num_labels=3).eval()
    model.config.pad_token_id = model.config.pad_token_id if name == "roberta" else 0
    theirs = peft.PeftModel.from_pretrained(model, str(result.output_dir)).eval()
    merge_adapter(result.output_dir)
    merged = t.AutoModelForSequenceClassification.from_pretrained("out-merged").eval()
    assert merged.config.id2label == {0: "neg", 1: "plain", 2: "pos"}
    ids = tiny_tokenizer(None)("awful ugly", return_tensors="pt")["input_ids"]
    expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    for folder in ("out", "out-merged"):
        said = predict(folder, texts=["awful ugly", "nice"])
        scores = torch.tensor(list(said[0].scores.values()))
        torch.testing.assert_close(scores, expected[0].softmax(-1), atol=1e-5, rtol=1e-4)
    again = evaluate("out", "out")
    assert again.scores == pytest.approx(result.after.scores)
    assert again.loss == pytest.approx(result.after.loss, abs=1e-5)
    assert "lowrank predict" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_peft_saves_is_read(bases, name, tmp_path):
    model = t.AutoModelForSequenceClassification.from_pretrained(bases(name), num_labels=3, pad_token_id=0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    ids = tiny_tokenizer(None)("awful ugly", return_tensors="pt")["input_ids"]
    expected = theirs(input_ids=ids).logits
    fresh = t.AutoModelForSequenceClassification.from_pretrained(bases(name), num_labels=3, pad_token_id=0).eval()
    torch.testing.assert_close(lowrank.load(fresh, tmp_path)(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_is_the_same_to_the_byte(write_task, tmp_path):
    path = write_task("bert", training={"save_steps": 2, "lr_scheduler_type": "constant"})
    lowrank.train(path, ["training.output_dir=whole"])
    lowrank.train(path, ["training.max_steps=3"])
    lowrank.train(path, ["training.max_steps=6"], resume=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_two_processes_train_what_one_does(write_task, tmp_path):
    path = write_task("bert", training={"learning_rate": 1e-3})
    alone = lowrank.train(path, ["training.output_dir=alone", "training.gradient_accumulation_steps=2"])
    processes = start_ranks(tmp_path, ["train", str(path)], 2)
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "out.txt").read_text()
    together = load_file(tmp_path / "out" / ADAPTER)
    for key, tensor in load_file(alone.output_dir / ADAPTER).items():
        torch.testing.assert_close(together[key], tensor, atol=1e-6, rtol=0)


def test_check_and_preview_show_the_labels(write_task, capsys):
    path = write_task("llama")
    check(path)
    assert "one of 3 labels for each row: neg, plain, pos" in capsys.readouterr().out
    preview(path, row=2)
    assert "train.jsonl:2, label neg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "scores"), [([0.5, 1.5, -2.0], {"mse", "pearson"}), ([["x", "y"], ["x"], []], {"accuracy", "f1"})]
)
def test_numbers_and_several_labels(write_task, labels, scores):
    these = [{**row, "label": labels[i % 3]} for i, row in enumerate(rows(18))]
    result = lowrank.train(write_task("llama", these, these[:9], training={"num_train_epochs": 1}))
    assert scores <= result.after.scores.keys()
    assert len(predict("out", texts=["nice", "awful"])) == 2


def test_two_texts_are_told_apart_where_the_base_does(write_task, tmp_path):
    these = [{**row, "text_pair": "and then"} for row in rows(9)]
    result = lowrank.train(write_task("bert", these, these, training={"num_train_epochs": 1}))
    write_rows(tmp_path / "ask.jsonl", [{"text": "nice", "text_pair": "and"}])
    predict(str(result.output_dir), file="ask.jsonl", out="said.jsonl")
    said = json.loads((tmp_path / "said.jsonl").read_text())
    assert said["prediction"] in ("neg", "plain", "pos")
    assert sum(said["scores"].values()) == pytest.approx(1.0)


def test_columns_of_other_names(write_task):
    these = [{"review": row["text"], "stars": row["label"]} for row in rows(9)]
    path = write_task("llama", these, these, data={"columns": {"text": "review", "label": "stars"}})
    assert lowrank.train(path, ["training.max_steps=1"]).after.scores is not None


def test_init_writes_a_config_that_runs(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "kinds.jsonl", rows(60))
    path = init("kinds.jsonl", bases("bert"), overrides=["training.report_to=none"])
    assert "task: sequence_classification" in path.read_text()
    assert lowrank.train(path, ["training.max_steps=2"]).steps == 2
