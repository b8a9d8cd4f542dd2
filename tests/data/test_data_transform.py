"""`data.transform`: rows are what the user's function makes of them, from every source, and its source counts."""

from __future__ import annotations

import json

import pytest
from short_run import base, write_config  # noqa: F401  # fixtures
from tiny import tiny_tokenizer

import lowrank
from lowrank.data import load_examples, stream_batches
from lowrank.errors import InputError

MODULE = """
def spoken(row):
    if row["ask"] == "skip":
        return None
    return {"prompt": row.pop("ask"), "completion": row["say"]["it"]}

def wrong(row):
    return row["nothing"]

def listed(row):
    return [row]

def two(row, other):
    return row
"""
ROWS = [{"ask": f"number {i}", "say": {"it": f"it is {i}"}} for i in range(6)]
PLAIN = [{"prompt": row["ask"], "completion": row["say"]["it"]} for row in ROWS]


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A module of a name of its own in the current folder."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokens(examples) -> list:
    return [examples.arrays(at)[0].tolist() for at in range(len(examples))]


@pytest.mark.parametrize("kind", ["file", "rows", "parquet"])
def test_rows_are_what_the_function_gives(module, tmp_path, kind):
    rows = [*ROWS, {"ask": "skip", "say": {"it": "no"}}]
    source = {
        "file": lambda: write(tmp_path / "rows.jsonl", rows),
        "rows": lambda: rows,
        "parquet": lambda: parquet(tmp_path, rows),
    }[kind]()
    options = {"max_length": 64, "transform": f"{module}:spoken"}
    found = load_examples(source, tiny_tokenizer(), **options)
    assert tokens(found) == tokens(load_examples(PLAIN, tiny_tokenizer(), max_length=64))
    assert found.report.empty == 1
    assert tokens(load_examples(source, tiny_tokenizer(), **options)) == tokens(found), (
        "rows in memory stay as they were"
    )


def parquet(folder, rows) -> str:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def test_a_stream_and_columns_come_after_it(module, tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    options = {"max_length": 64, "packing": True, "batch_size": 1, "max_tokens": 256, "pad_token_id": 0, "seed": 0}
    more = {"transform": f"{module}:spoken", "columns": {"prompt": "prompt", "completion": "completion"}}
    stream = stream_batches(source, tiny_tokenizer(), **options, **more)
    plain = stream_batches(write(tmp_path / "plain.jsonl", PLAIN), tiny_tokenizer(), **options)
    assert [b.input_ids.tolist() for b in stream.batches(0)] == [b.input_ids.tolist() for b in plain.batches(0)]
    assert stream.fingerprint != stream_batches(source, tiny_tokenizer(), **options).fingerprint


def test_a_changed_function_gives_other_rows(module, tmp_path, monkeypatch):
    import importlib
    import sys

    from lowrank.data.reading.sources import open_sources

    before = open_sources(ROWS, transform=f"{module}:spoken")[0].rows.fingerprint
    (tmp_path / f"{module}.py").write_text(MODULE.replace('row["say"]["it"]', '"always this"'))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.reload(sys.modules[module])
    assert open_sources(ROWS, transform=f"{module}:spoken")[0].rows.fingerprint != before


PARTIAL = """
import functools

def said(row, word):
    return {"prompt": row["ask"], "completion": word}

def yes(row):
    return said(row, "yes")

one = functools.partial(said, word="one")
"""


def test_a_changed_partial_and_another_function_of_the_module_give_other_rows(tmp_path, monkeypatch):
    import importlib
    import sys

    from lowrank.data.reading.sources import open_sources

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_partial.py").write_text(PARTIAL)
    source = write(tmp_path / "rows.jsonl", ROWS)
    options = {"max_length": 64, "packing": True, "batch_size": 1, "max_tokens": 256, "pad_token_id": 0, "seed": 0}

    def both(name: str) -> tuple[str, str]:
        named = f"own_partial:{name}"
        stream = stream_batches(source, tiny_tokenizer(), **options, transform=named)
        return open_sources(ROWS, transform=named)[0].rows.fingerprint, stream.fingerprint

    before = both("one")
    assert not set(before) & set(both("yes"))
    (tmp_path / "own_partial.py").write_text(PARTIAL.replace('word="one"', 'word="another"'))
    importlib.reload(sys.modules["own_partial"])
    assert not set(before) & set(both("one"))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("{}:spokn", r"data\.transform: own_\d+ has no function 'spokn'\nPerhaps it is own_\d+:spoken\."),
        ("nowhere:spoken", r"data\.transform: there is no module 'nowhere'.*\nPut nowhere\.py into"),
        ("spoken", r"'spoken' names no function\nWrite module:function"),
        ("{}:two", r"cannot be called with \(row\): missing a required argument: 'other'"),
        ("{}:wrong", r"rows row 1: own_\d+:wrong raised KeyError: 'nothing'"),
        ("{}:listed", r"rows row 1: own_\d+:listed gave a list\nLet it give a row"),
    ],
)
def test_what_is_wrong_with_it_is_told(module, named, message):
    with pytest.raises(InputError, match=message):
        load_examples(ROWS, tiny_tokenizer(), max_length=64, transform=named.format(module))


def test_a_module_that_does_not_import_is_told(module, tmp_path):
    (tmp_path / "broken_rows.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="broken_rows does not import: ModuleNotFoundError"):
        load_examples(ROWS, tiny_tokenizer(), max_length=64, transform="broken_rows:f")


def test_a_run_trains_on_what_the_function_gives(module, tmp_path, write_config):  # noqa: F811
    (tmp_path / f"{module}.py").write_text(MODULE)
    path = write_config()
    write(tmp_path / "raw.jsonl", ROWS)
    where = ["training.max_steps=1", "data.train=raw.jsonl", f"data.transform={module}:spoken", "data.eval=null"]
    assert lowrank.train(path, where).steps == 1
    with pytest.raises(InputError, match="there is no module 'no_such_rows'"):
        lowrank.train(path, [*where, "data.transform=no_such_rows:f", "training.output_dir=other"])
