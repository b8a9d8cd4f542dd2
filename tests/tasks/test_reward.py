"""Reward models: TRL's tokens, loss and gradients, peft both ways, a run's whole way, rows that are no pairs."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers as t
import trl
from datasets import Dataset
from labelled import WORDS
from processes import start_ranks
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

import lowrank
from lowrank.data import Batch
from lowrank.errors import InputError
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.merge import merge_adapter
from lowrank.recipes.predict import predict
from lowrank.tasks.reward_model import Reward, Rewarder
from lowrank.tasks.task import Wishes

ADAPTER = "adapter_model.safetensors"
NAMED = {"task": "reward"}


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TEXTS = [
    {"prompt": "Say: ", "chosen": "a good word", "rejected": "bad", "margin": 0.5},
    {"prompt": "And? ", "chosen": "nice", "rejected": "a longer and ugly one", "margin": 0.0},
    {"prompt": "x", "chosen": "y", "rejected": "z", "margin": 1.0},
]
ALONE = [{"chosen": "a good word", "rejected": "bad"}, {"chosen": "[nice]", "rejected": "ugly"}]
CHATS = [
    {"chosen": said("Say!", "a good word"), "rejected": said("Say!", "bad")},
    {"chosen": said("And?", "nice"), "rejected": said("And?", "a longer and ugly one")},
]
PROMPTED = [
    {"prompt": [row["chosen"][0]], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]} for row in CHATS
]


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    """A kind word is better than an unkind one."""
    kind, unkind = WORDS["pos"].split(), WORDS["neg"].split()
    return [
        {"prompt": f"{i}: ", "chosen": kind[i % 3], "rejected": f"{unkind[i % 3]} {unkind[(i + 1) % 3]}"}
        for i in range(first, first + count)
    ]


def batch_of(rows) -> Batch:
    encode = Reward().encoder(Wishes())
    found = [encode(row, tiny_tokenizer(), None) for row in rows]
    return Rewarder().collate([(one.ids, one.marks) for one in found], [one.payload for one in found], 0)


def reward_base() -> t.PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, 0
    return t.LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    "rows", [TEXTS, ALONE, CHATS, PROMPTED], ids=["texts", "texts alone", "chats", "prompted chats"]
)
def test_tokens_loss_and_gradients_are_trls(tmp_path, rows):
    ours, theirs = reward_base(), reward_base()
    args = trl.RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=False,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        theirs, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    fed = trainer.data_collator(list(trainer.train_dataset))
    batch, count = batch_of(rows), len(rows)
    places = batch.given["places"].t().flatten()
    assert torch.equal(batch.input_ids[places], fed["input_ids"])
    expected = trainer.compute_loss(theirs.eval(), dict(fed))
    expected.backward()
    loss = Rewarder().loss()(ours, batch) / count
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)


def scored(model, text: str) -> float:
    ids = tiny_tokenizer()(text + tiny_tokenizer().eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_run_from_config_to_merged_model_and_through_peft(write_task, bases, name):
    result = lowrank.train(write_task(name, pairs(24), pairs(6, 30), model=NAMED))
    assert result.after.scores.keys() == {"accuracy", "margin"}
    assert result.after.scores["accuracy"] == 1.0
    assert result.after.scores["margin"] > result.before.scores["margin"]
    base = t.AutoModelForSequenceClassification.from_pretrained(bases(name), num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, "out").eval()
    merge_adapter("out")
    merged = t.AutoModelForSequenceClassification.from_pretrained("out-merged").eval()
    expected = scored(theirs, "a nice text")
    assert scored(merged, "a nice text") == pytest.approx(expected, abs=1e-5)
    for folder in ("out", "out-merged"):
        (found,) = predict(folder, texts=["a nice text"])
        assert found.scores == {"reward": pytest.approx(expected, abs=1e-5)}
    both = predict("out", file="eval.jsonl")
    assert [one.said for one in both] == ["chosen"] * 6
    assert both[0].scores["rejected"] == pytest.approx(scored(theirs, "30: bad awful"), abs=1e-5)
    assert evaluate("out", "out").scores == pytest.approx(result.after.scores, abs=1e-5)


def test_a_resumed_run_is_the_same_to_the_byte_and_two_processes_train_what_one_does(write_task, tmp_path):
    steady = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    path = write_task("llama", pairs(32), pairs(6, 40), model=NAMED, training=steady)
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


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"chosen": "a", "rejected": "a"}, "train.jsonl:3: chosen and rejected are the same"),
        ({"chosen": "a", "rejected": " "}, "train.jsonl:3: the rejected answer is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, "train.jsonl:3: the row has several rejected answers"),
        ({"chosen": "a"}, "train.jsonl:3: the row has 'chosen', but lacks 'rejected'"),
        ({"chosen": "a", "rejected": "b", "margin": "much"}, "train.jsonl:3: the margin is 'much'"),
    ],
)
def test_rows_that_are_no_pairs(write_task, row, told):
    plain = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}]
    with pytest.raises(InputError, match=re.escape(told)):
        lowrank.train(write_task("llama", [*plain, row], plain, model=NAMED))
