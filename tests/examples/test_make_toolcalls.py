"""The quickstart's data: what the files promise about values, sentences and answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import make_toolcalls as script
import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
TYPES = {"string": str, "array": list, "boolean": bool, "integer": int, "number": (int, float)}


SOURCE = yaml.safe_load((EXAMPLES / "data/toolcalls.yaml").read_text(encoding="utf-8"))


def read(split: str) -> list[dict[str, str]]:
    """Every request of a file with its answer, as role -> content; training asks several under one system prompt."""
    found = []
    for line in (EXAMPLES / f"data/toolcalls_{split}.jsonl").read_text(encoding="utf-8").splitlines():
        system, *turns = json.loads(line)["messages"]
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            found.append({turn["role"]: turn["content"] for turn in (system, user, assistant)})
    return found


def as_read(exchange: script.Exchange) -> dict[str, str]:
    return {turn["role"]: turn["content"] for turn in exchange.turns()}


TRAIN, EVAL = read("train"), read("eval")


def signatures(system: str) -> dict[str, dict[str, tuple[str, bool]]]:
    """What the system prompt states: function -> argument -> (type, may be missing)."""
    stated = {}
    for name, arguments in re.findall(r"^(\w+)\((.*)\)$", system, re.MULTILINE):
        parsed = re.findall(r"(\w+)(\??)(?:: (\w+))?", arguments)
        stated[name] = {argument: (kind or "string", bool(optional)) for argument, optional, kind in parsed}
    return stated


def values(rows: Iterable[dict[str, str]]) -> set[str | float]:
    """Every name, place, number, date, time and text in the answers in lower case; not true and false."""
    found: set[str | float] = set()
    for row in rows:
        for value in json.loads(row["assistant"])["arguments"].values():
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, bool):
                    found.add(one.casefold() if isinstance(one, str) else one)
    return found


def test_the_files_are_what_the_script_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_toolcalls.py", "--out", str(tmp_path)])
    script.main()
    for name in ("toolcalls_train.jsonl", "toolcalls_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


def test_sizes():
    lines = {split: len((EXAMPLES / f"data/toolcalls_{split}.jsonl").read_text().splitlines()) for split in script.ROWS}
    assert lines == script.ROWS
    assert lines["train"] >= 800
    assert lines["eval"] >= 120
    assert len(SOURCE["functions"]) >= 8
    for function in SOURCE["functions"].values():
        assert len(function["templates"]) >= 12


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_every_answer_is_a_call_of_a_stated_function(rows):
    functions = set()
    for row in rows:
        assert list(row) == ["system", "user", "assistant"]
        call = json.loads(row["assistant"])
        assert row["assistant"] == json.dumps(call, ensure_ascii=False, separators=(",", ":"))
        stated = signatures(row["system"])[call["name"]]
        functions.add(call["name"])
        assert {name for name, (_, optional) in stated.items() if not optional} <= set(call["arguments"])
        for name, value in call["arguments"].items():
            kind, _ = stated[name]
            assert isinstance(value, TYPES[kind])
            assert isinstance(value, bool) == (kind == "boolean")
    assert functions == set(SOURCE["functions"])


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_every_value_stands_in_its_request(rows):
    for row in rows:
        assert {value for value in values([row]) if str(value) not in row["user"].casefold()} == set()


def test_no_value_of_eval_occurs_in_train():
    assert values(TRAIN) & values(EVAL) == set()


def test_no_text_value_of_eval_stands_inside_a_request_of_train():
    """Sharper than equal values: a room that training names inside a message would not be new."""
    train = "\n".join(row["user"].casefold() for row in TRAIN)
    texts = {value for value in values(EVAL) if isinstance(value, str)}
    assert {value for value in texts if re.search(rf"(?<![\w:]){re.escape(value)}(?![\w:])", train)} == set()


def test_all_spellings_of_a_time_are_in_one_split():
    def clock_face(value: str) -> tuple[int, str] | None:
        match = re.fullmatch(r"(\d+)(?::(\d\d))?( am| pm)?", value)
        return (int(match[1]) % 12, match[2] or "00") if match and (match[2] or match[3]) else None

    train, held = ({clock_face(str(value)) for value in values(rows)} - {None} for rows in (TRAIN, EVAL))
    assert len(held) > 10
    assert train & held == set()


def test_templates_that_training_never_shows():
    train, held = (
        script.make_exchanges(SOURCE, split, len(rows)) for split, rows in (("train", TRAIN), ("eval", EVAL))
    )
    assert [exchange.request for exchange in held] == [row["user"] for row in EVAL]
    shown = {exchange.template for exchange in train}
    held_out = [exchange.template not in shown for exchange in held]
    assert sum(held_out) / len(held_out) >= 0.25


def test_no_request_is_asked_twice():
    requests = [row["user"].casefold() for row in TRAIN + EVAL]
    assert len(set(requests)) == len(requests)


def test_another_seed_gives_other_rows_and_keeps_the_promise():
    train, held = (script.make_exchanges(SOURCE, split, 160, seed=7) for split in ("train", "eval"))
    assert [exchange.request for exchange in train] != [row["user"] for row in TRAIN[:160]]
    assert values(map(as_read, train)) & values(map(as_read, held)) == set()
