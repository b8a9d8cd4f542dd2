"""Answers to one prompt as trees: what a batch holds is what each answer has alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import tiny_tokenizer

from lowrank.config.sections import DataSection, TrainingSection
from lowrank.data.batches.trees import Verdict
from lowrank.errors import InputError
from lowrank.recipes.parts.preference_rows import read_preferences

ROWS = [
    {"prompt": "Say it:", "chosen": " yes", "rejected": [" no", " yes, or no"]},
    {"prompt": "Well?", "chosen": " it is good", "rejected": " it is bad"},
    {"prompt": "A longer question:", "chosen": " a", "rejected": " b", "margin": 0.5},
]


@pytest.fixture
def plan_of(tmp_path):
    """The training batches of some rows."""

    def plan(rows=None, objective="dpo", *, training=(), **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
        section = DataSection(**{"train": str(path), "max_length": 64, **data})
        trained = TrainingSection(output_dir="out", objective=objective, **dict(training))
        return read_preferences(section, trained, tiny_tokenizer(None))[0]

    return plan


@pytest.mark.parametrize("packing", [True, False], ids=["packs", "rows"])
@pytest.mark.parametrize("shared", ["auto", False], ids=["shared", "apart"])
def test_each_answer_is_there_behind_its_prompt(plan_of, packing, shared):
    plan = plan_of(packing=packing, **({"share_prefixes": shared} if packing else {}))
    batch = plan.batch(plan.epoch(0)[0]) if packing else plan.trees.batch([0, 1, 2], packing=False, pad_token_id=0)
    rows = plan.epoch(0)[0].rows.tolist() if packing else [0, 1, 2]
    branches = [branch for row in rows for branch in plan.trees.branches(row)]
    answers, tokens = batch.given["answers"].numpy(), batch.given["tokens"].numpy()
    for at, (ids, mask) in enumerate(branches):
        own = np.sort(tokens[answers == at])
        assert sorted(batch.targets.tokens[own].tolist()) == sorted(ids[mask].tolist())
        assert int(batch.given["lengths"][at]) == mask.sum()
    computed = sum(len(ids) for ids, _ in branches)
    if packing and shared == "auto":
        assert batch.computed == sum(plan.trees.lengths[rows]) < computed
        assert batch.parents is not None
    elif packing:
        assert batch.computed == computed
        assert batch.parents is None
    assert plan.computed(plan.epoch(0)[0]) == (batch.computed if packing else plan.batch(plan.epoch(0)[0]).computed)


def test_pairs_and_margins(plan_of):
    plan = plan_of(training={"tokens_per_batch": 512}.items())
    batch = plan.trees.batch([0, 2], packing=True, pad_token_id=0)
    assert list(zip(batch.given["chosen"].tolist(), batch.given["rejected"].tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (3, 4),
    ]
    assert batch.given["margins"].tolist() == [0.0, 0.0, 0.5]
    assert batch.counts == (3, len(" yes") + 1 + len(" a") + 1)  # pairs, and tokens of what was chosen, ends too
    assert Verdict((3, 3, 3), (True, False, True)).pairs == [(0, 1), (2, 1)]


def test_orpo_learns_the_chosen_text_with_its_prompt(plan_of):
    plan = plan_of(ROWS[1:2], "orpo")
    batch = plan.batch(plan.epoch(0)[0])
    ids, _ = plan.trees.branches(0)[0]
    assert len(batch.given["whole"]) == len(ids) - 1 == batch.counts[1]
    assert int(batch.given["lengths"][0]) == len(" it is good") + 1


def test_ktos_other_pack_has_each_prompt_with_another_answer(plan_of):
    rows = [{"prompt": f"{name}:", "completion": f" {name * 2}", "label": name == "b"} for name in "abc"]
    plan = plan_of(rows, "kto", training={"tokens_per_batch": 512}.items())
    batch = plan.trees.batch([0, 1, 2], packing=True, pad_token_id=0)
    texts, begin = [], 0
    for length in batch.beside.segments:
        texts.append(tiny_tokenizer(None).decode(batch.beside.input_ids[0, begin : begin + length]))
        begin += length
    assert texts == ["a: cc<|im_end|>", "b: aa<|im_end|>", "c: bb<|im_end|>"]
    assert batch.given["liked"].tolist() == [False, True, False]


def test_a_pack_holds_the_longest_tree_unless_it_is_told_its_size(plan_of):
    long = [{"prompt": "p" * 40, "chosen": "c" * 20, "rejected": "r" * 20}]
    assert plan_of(long).max_tokens == 40 + 21 + 21 > 64
    with pytest.raises(InputError, match=r"take 82 tokens, the prompt counted once, and a pack holds 64"):
        plan_of(long, training={"tokens_per_batch": 64}.items())


REFUSED = {
    "the same": (
        [ROWS[0], {"prompt": "a", "chosen": " b", "rejected": " b"}],
        "dpo",
        "rows.jsonl:2: chosen and rejected are",
    ),
    "long": ([{"prompt": "p" * 70, "chosen": " b", "rejected": " c"}], "dpo", r"longer than data.max_length = 64"),
    "a margin": (ROWS, "ipo", "rows.jsonl:3: the row has a margin, which ipo does not obey"),
    "one kind": ([{"prompt": "a", "completion": " b", "label": True}] * 2, "kto", "every answer is labelled true"),
}


@pytest.mark.parametrize(("rows", "objective", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(plan_of, rows, objective, message):
    with pytest.raises(InputError, match=message):
        plan_of(rows, objective)


def test_rows_that_are_cut_keep_something_of_each_answer(plan_of):
    rows = [
        {"prompt": "p" * 60, "chosen": "c" * 20, "rejected": "r" * 20},
        {"prompt": "p" * 70, "chosen": "a", "rejected": "b"},
    ]
    plan = plan_of(rows, too_long="truncate")
    assert [len(ids) for ids, _ in plan.trees.branches(0)] == [64, 64]
    assert len(plan.examples) == plan.counts.examples == 1
    assert plan.counts.dropped == plan.counts.truncated == 1
