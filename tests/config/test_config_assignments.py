"""`--set section.key=value`: the value is taken whole, as what the key takes."""

from __future__ import annotations

import pytest


def value_at(config, key: str):
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


@pytest.mark.parametrize(
    "text",
    [
        *("runs/try #2", "#2", "runs/a: b", "a:", "it's", 'a "b" c', "a, b", "*.jsonl", "&a", "!x", "%x", "@x", "| x"),
        *("- a", "? a", "> a", "a=b", "2024", "1e5", "0x1f", "true", "no", "1_000", "2024-01-01", "ü #ü", "a]", "-1"),
    ],
)
def test_a_text_is_what_stands_there(load, good, text):
    assert load(good, f"training.output_dir={text}").training.output_dir == text
    assert load(good, f"model.revision={text}").model.revision == text


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("training.output_dir='a #b: c'", "a #b: c"),
        ('training.output_dir="a\\tb"', "a\tb"),
        ("training.output_dir= a ", "a"),
        ("model.revision=null", None),
        ("model.revision=", None),
        ("model.revision=~", None),
        ("model.revision='null'", "null"),
        ("training.seed= 7", 7),
        ("training.learning_rate=1e-4", 1e-4),
        ("training.fsdp=true", True),
        ("training.fsdp=no", False),
        ("training.gradient_checkpointing=selective", "selective"),
        ("data.eval=0.05", 0.05),
        ("data.eval=a b.jsonl", "a b.jsonl"),
        ("data.train=[a #1.jsonl, 'b #2.jsonl']", None),
        ("data.train=['a #1.jsonl', b.jsonl]", ["a #1.jsonl", "b.jsonl"]),
        ("adapter.rank_pattern={q_proj: 8}", {"q_proj": 8}),
        ("adapter.rank_pattern.q_proj=8", {"q_proj": 8}),
        ("adapter.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (r"adapter.target_modules=.*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_what_a_value_is(load, told, good, assignment, value):
    if value is None and "[" in assignment:
        assert "not valid YAML" in told(good, assignment)[0]
        return
    key = assignment.partition("=")[0].replace(".q_proj", "")
    assert value_at(load(good, assignment), key) == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.seed=5 # why", "--set training.seed: '5 # why' is not a whole number"),
        ("training.seed=5, 6", "--set training.seed: '5, 6' is not a whole number"),
        ("training.output_dir=", "--set training.output_dir: is empty; it takes a text"),
        ("training.output_dir=''", "--set training.output_dir: the path is empty"),
        ("training.output_dir='a' b", "--set training.output_dir: not valid YAML: expected '<document start>'"),
        ("training.output_dir='a' #b", "--set training.output_dir: not valid YAML: '#b' follows the value"),
        ("training.output_dir='a", "--set training.output_dir: not valid YAML: found unexpected end of stream"),
        ("adapter.rank_pattern=q_proj: 8", "--set adapter.rank_pattern: 'q_proj: 8' is not a mapping"),
    ],
)
def test_what_is_none(told, good, assignment, message):
    [line] = told(good, assignment)
    assert line.startswith(message)
