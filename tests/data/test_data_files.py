"""What is read is what the files hold: whatever the format, the ending, the compression, and whenever it was written."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer

from lowrank.data import load_examples, stream_batches
from lowrank.data.loading import load
from lowrank.data.reading.readers import open_rows, stream_rows
from lowrank.data.reading.row_folders import split_of
from lowrank.data.reading.sources import open_sources
from lowrank.data.reading.tables import dataset_rows
from lowrank.errors import InputError

TOKENIZER = tiny_tokenizer()


def rows(word, count=3):
    return [{"prompt": f"q{number}", "completion": word} for number in range(count)]


def lines(given):
    return "".join(json.dumps(row) + "\n" for row in given).encode()


def cells(given, delimiter=","):
    return "\n".join(delimiter.join(row.values()) for row in [{"a": "prompt", "b": "completion"}, *given]).encode()


def parquet(path, given):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)


def arrow(path, given):
    table = pyarrow.Table.from_pylist(given)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write(table)


def saved(path, given):
    shutil.rmtree(path, ignore_errors=True)
    datasets.Dataset.from_list(given).save_to_disk(str(path))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "_fingerprint": "always the same"}))


def folder(path, given):
    path.mkdir(exist_ok=True)
    (path / "a.jsonl").write_bytes(lines(given[:1]))
    (path / "b.jsonl").write_bytes(lines(given[1:]))


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


WRITERS = {
    "rows.jsonl": lambda path, given: path.write_bytes(lines(given)),
    "rows.json": lambda path, given: path.write_text(json.dumps(given)),
    "lines.json": lambda path, given: path.write_bytes(lines(given)),
    "rows.csv": lambda path, given: path.write_bytes(cells(given)),
    "rows.tsv": lambda path, given: path.write_bytes(cells(given, "\t")),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "rows.jsonl.gz": lambda path, given: path.write_bytes(gzip.compress(lines(given))),
    "rows.csv.gz": lambda path, given: path.write_bytes(gzip.compress(cells(given))),
    "rows.jsonl.bz2": lambda path, given: path.write_bytes(bz2.compress(lines(given))),
    "rows.json.xz": lambda path, given: path.write_bytes(lzma.compress(json.dumps(given).encode())),
    "rows.jsonl.zst": lambda path, given: path.write_bytes(zstd(lines(given))),
    "saved": saved,
    "folder": folder,
}


@pytest.fixture(autouse=True)
def worth_caching(monkeypatch):
    monkeypatch.setattr(load, "WORTH_CACHING", 1)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_rewritten_is_read_again_even_with_the_same_size_and_time(tmp_path, name):
    path = tmp_path / name
    for word in ("red", "sky", "an"):  # the last one is shorter
        WRITERS[name](path, rows(word))
        for file in [path, *path.rglob("*")]:
            os.utime(file, (1_700_000_000, 1_700_000_000))
        assert [load_examples(path, TOKENIZER, max_length=64).row(at) for at in range(3)] == rows(word)
        learned = [
            TOKENIZER.decode(ids[mask])
            for ids, mask in map(load_examples(path, TOKENIZER, max_length=64).arrays, range(3))
        ]
        assert learned == [f"{word}<|im_end|>"] * 3
        assert [dict(row) for row, _ in stream_rows(str(path), "train", None)] == rows(word)


def test_the_same_bytes_under_another_ending_are_other_rows(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(lines([{"text": "one"}]))
    texts = [load_examples(tmp_path / name, TOKENIZER, max_length=64).row(0)["text"] for name in ("a.txt", "a.jsonl")]
    assert texts == ['{"text": "one"}\n', "one"]


def test_keys_in_another_order_are_other_rows():
    assert open_sources_fingerprint({"a": 1, "b": 2}) != open_sources_fingerprint({"b": 2, "a": 1})


def open_sources_fingerprint(arguments):
    return open_sources([{"messages": [{"tool_calls": [{"function": {"arguments": arguments}}]}]}])[0].rows.fingerprint


def test_a_data_set_in_memory_is_known_by_its_content():
    one, same, other = (datasets.Dataset.from_list(rows(word)) for word in ("red", "red", "sky"))
    other._fingerprint = one._fingerprint
    prints = [dataset_rows(each, "x").fingerprint for each in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert dataset_rows(one.select([1, 2]), "x").fingerprint != prints[0]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_cell_stays_the_text_that_it_is(tmp_path, ending):
    delimiter = "," if ending == "csv" else "\t"
    words = ["NA", "None", "null", "NaN", "02108", "3.10", "0", "1", "True", "1e5", " padded ", "é", "∅", "2024-01-01"]
    quoted = ['say "hi"', "two\nlines", f"a{delimiter}b", "a\r\nb"]
    path = tmp_path / f"rows.{ending}"
    body = [f"q{delimiter}{word}" for word in words]
    body += ["q" + delimiter + '"' + word.replace('"', '""') + '"' for word in quoted]
    path.write_bytes(("\ufeffprompt" + delimiter + "completion\n" + "\n".join(body) + "\n").encode())
    examples = load_examples(path, TOKENIZER, max_length=64)
    assert [examples.row(at)["completion"] for at in range(len(examples))] == [*words, *quoted]
    learned = [TOKENIZER.decode(ids[mask]) for ids, mask in map(examples.arrays, range(len(examples)))]
    assert learned[:3] == ["NA<|im_end|>", "None<|im_end|>", "null<|im_end|>"]
    assert [examples.rows.where(at).rpartition(":")[2] for at in (0, 15, 16)] == ["2", "17", "19"]


def test_an_empty_cell_is_an_empty_text(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,input,output,system,tools\nGreet,,Hello,,\n,,,,\n")
    examples = load_examples(tmp_path / "rows.csv", TOKENIZER, max_length=99)
    assert examples.row(0)["input"] == ""
    assert "system" not in TOKENIZER.decode(examples[0].input_ids)
    assert examples.report.empty == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt;completion\na;b\n", r"rows.csv:1: the cells are separated by ';', not by ','\nSave it with commas"),
        (
            b"prompt\tcompletion\na\tb\n",
            r"rows.csv:1: the cells are separated by '\\t', not by ','\nName the file .tsv",
        ),
        (b"prompt,completion\na,b\na,b,c\n", r"rows.csv:3: the row has 3 cells, the header 2"),
        (b"prompt,completion\na\n", r"rows.csv:2: the row has 1 cells, the header 2"),
        (b"prompt,prompt\na,b\n", r"rows.csv:1: two columns are called 'prompt'"),
        (b'prompt,completion\na,"b\n', r"rows.csv:2: not valid CSV: unexpected end of data"),
        (
            b"prompt,completion\na,b\nc,caf\xe9\n",
            r"rows.csv:3: the byte 0xe9 is not UTF-8 text\nWrite the file as UTF-8",
        ),
        (b"prompt,completion\n", r"there are no rows"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_csv_file_is_named(tmp_path, content, message):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_examples(tmp_path / "rows.csv", TOKENIZER, max_length=64)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"r.jsonl:2: the byte 0xe9 is not UTF-8"),
        ("r.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', r"r.json:2: the byte 0xe9 is not UTF-8"),
        ("r.txt", b"one\ntwo\ncaf\xe9", r"r.txt:3: the byte 0xe9 is not UTF-8"),
        ("r.jsonl", '{"text": "a"}'.encode("utf-16"), r"r.jsonl: the file is UTF-16 text, not UTF-8"),
        ("r.jsonl", gzip.compress(b"{}", mtime=0), r"r.jsonl: the file is compressed \(gzip\)\nName it r.jsonl.gz."),
        ("r.jsonl.gz", b'{"text": "a"}\n', r"r.jsonl.gz: cannot be read: Not a gzipped file"),
        ("r.jsonl.gz", gzip.compress(lines(rows("x", 500)), mtime=0)[:-40], r"r.jsonl.gz: the compressed file is cut off"),
        ("r.jsonl.zst", b"\x28\xb5\x2f\xfdnothing", r"r.jsonl.zst: cannot be read"),
        ("r.jsonl", b"<!DOCTYPE html><html>", r"r.jsonl: the file is a web page"),
        ("r.parquet", b"PAR1 and no more", r"r.parquet: cannot be read as Parquet"),
        ("r.arrow", b"ARROW1 and no more", r"r.arrow: cannot be read as Arrow"),
        ("r.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"r.jsonl:1: the line is not readable: Exceeds the limit"),
        ("r.jsonl", f'{{"text": {DEEP}}}'.encode(), r"r.jsonl:1: the line is nested too deeply"),
        ("r.json", DEEP.encode(), r"r.json: the file is nested too deeply"),
        *(
            (name, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", r"the file is a Git LFS pointer.*\nFetch it: git lfs pull")
            for name in ("r.jsonl", "r.json", "r.csv", "r.parquet", "r.arrow", "r.txt", "r.jsonl.gz")
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_examples(tmp_path / name, TOKENIZER, max_length=64)
    batches = stream_batches(
        str(tmp_path / name),
        TOKENIZER,
        max_length=64,
        packing=True,
        batch_size=1,
        max_tokens=64,
        pad_token_id=0,
        seed=0,
    )
    with pytest.raises(InputError, match=message):
        list(batches.batches(0))


@pytest.mark.parametrize("blank", ["", "\n", "\r\n"])
def test_a_byte_order_mark_and_odd_line_breaks_are_no_part_of_rows(tmp_path, blank):
    text = "\ufeff" + blank + '{"text": "one\u2028two"}\r\n\ufeff{"text": "three\x85"}'
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    examples = load_examples(tmp_path / "rows.jsonl", TOKENIZER, max_length=64)
    assert [examples.row(at)["text"] for at in range(2)] == ["one\u2028two", "three\x85"]


class TestSeveralFiles:
    def test_a_pattern(self, tmp_path):
        folder(tmp_path / "rows", rows("x"))
        (tmp_path / "rows" / "c.csv").write_bytes(cells(rows("y")))
        examples = load_examples(str(tmp_path / "rows" / "*.jsonl"), TOKENIZER, max_length=64)
        assert [examples.row(at) for at in range(len(examples))] == rows("x")
        assert examples.rows.where(2) == f"{tmp_path}/rows/b.jsonl:2"
        with pytest.raises(InputError, match="no file is called so"):
            load_examples(str(tmp_path / "*.parquet"), TOKENIZER, max_length=64)

    def test_a_file_with_a_bracket_in_its_name_is_itself(self, tmp_path):
        (tmp_path / "rows[1].jsonl").write_bytes(lines(rows("x")))
        assert len(load_examples(tmp_path / "rows[1].jsonl", TOKENIZER, max_length=64)) == 3

    @pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl.gz"])
    def test_a_folder_as_hubs_have_them(self, tmp_path, ending):
        (tmp_path / "data").mkdir()
        (tmp_path / "README.md").write_text("About")
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "rows.jsonl").write_text("{broken")
        for name, word in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")):
            WRITERS[f"rows.{ending}"](tmp_path / "data" / f"{name}.{ending}", rows(word, 2))
        words = [row["completion"] for row in open_rows(str(tmp_path), "train", None).read(0, 4)]
        assert words == ["a", "a", "b", "b"]
        assert len(open_rows(str(tmp_path), "test", None)) == 2
        with pytest.raises(InputError, match=r"the folder has no split 'validation'\nSplits: test, train"):
            open_rows(str(tmp_path), "validation", None)

    def test_a_folder_that_can_be_meant_in_two_ways_is_refused(self, tmp_path):
        for name in ("train.jsonl", "more.jsonl"):
            (tmp_path / name).write_bytes(lines(rows("x")))
        with pytest.raises(InputError, match=r"named after splits \(train\), others are not: more.jsonl"):
            open_rows(str(tmp_path), "train", None)
        (tmp_path / "train.csv").write_bytes(cells(rows("x")))
        with pytest.raises(InputError, match=r"files of several kinds: .csv, .jsonl"):
            open_rows(str(tmp_path), "train", None)

    def test_a_relative_folder_and_pattern(self, tmp_path, monkeypatch):
        folder(tmp_path / "rows", rows("x"))
        monkeypatch.chdir(tmp_path)
        for name in ("rows", "rows/", "./rows", "rows/*", "*/*.jsonl", "**/b.jsonl"):
            count = 2 if "b" in name else 3
            assert len(load_examples(name, TOKENIZER, max_length=64)) == count
            assert len(list(stream_rows(name, "train", None))) == count

    def test_splits_in_names(self, tmp_path):
        names = {"train.jsonl": "train", "a/dev-1.csv": "validation", "test/x.json": "test", "latest.json": None}
        assert {name: split_of(tmp_path.relative_to(tmp_path) / name) for name in names} == names


def test_a_data_set_is_read_through_its_transform_and_its_columns():
    table = datasets.Dataset.from_list([{**row, "messages": []} for row in rows("x")])
    shown = table.with_format("torch", columns=["prompt", "completion"])
    assert load_examples(shown, TOKENIZER, max_length=64).row(0) == rows("x")[0]
    loud = table.with_transform(
        lambda batch: {"prompt": batch["prompt"], "completion": ["LOUD"] * len(batch["prompt"])}
    )
    assert load_examples(loud, TOKENIZER, max_length=64).row(2) == {"prompt": "q2", "completion": "LOUD"}


def test_data_sets_that_are_several_or_have_no_rows_yet():
    table = datasets.Dataset.from_list(rows("x"))
    for given in (datasets.DatasetDict({"train": table}), table.to_iterable_dataset()):
        with pytest.raises(InputError, match=r"cannot be read from\nGive one Dataset"):
            load_examples(given, TOKENIZER, max_length=64)


def test_pictures_and_sound_are_not_decoded(tmp_path):
    away = {"bytes": None, "path": "/nowhere/at/all"}
    given = [{**row, "image": away, "sound": away} for row in rows("x")]
    text = datasets.Value("string")
    features = {"prompt": text, "completion": text, "image": datasets.Image(), "sound": datasets.Audio()}
    table = datasets.Dataset.from_list(given).cast(datasets.Features(features))
    pyarrow.parquet.write_table(table.data.table, tmp_path / "rows.parquet")
    for source in (table, tmp_path / "rows.parquet"):
        examples = load_examples(source, TOKENIZER, max_length=64)
        assert [examples.row(at)["completion"] for at in range(3)] == ["x"] * 3


def test_objects_of_mixed_types_are_read_as_they_were_written(tmp_path):
    arguments = [{"a": 1}, {"a": "one", "b": None}]
    given = [{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": each}}]}]} for each in arguments]  # fmt: skip
    table = datasets.Dataset.from_list(given, on_mixed_types="use_json")
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for source in (table, tmp_path / "rows.parquet"):
        read = open_sources(source if source is table else str(source))[0].rows.read(0, 2)
        called = [row["messages"][0]["tool_calls"][0]["function"]["arguments"] for row in read]
        assert [each["a"] for each in called] == [1, "one"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("large", [False, True])
def test_a_stream_knows_when_its_files_were_rewritten(tmp_path, monkeypatch, name, large):
    monkeypatch.setattr("lowrank.data.reading.data_files.BLOCK", 32)
    monkeypatch.setattr("lowrank.data.reading.data_files.MAP_FROM", 1024 if large else 2**20)
    prints = []
    for word in ("red", "red", "sky"):
        WRITERS[name](tmp_path / name, rows(word, 40))
        for file in [tmp_path / name, *(tmp_path / name).rglob("*")]:
            os.utime(file, (1_700_000_000, 1_700_000_000))
        sizes = {"max_length": 64, "packing": True, "batch_size": 1, "max_tokens": 64, "pad_token_id": 0, "seed": 0}
        prints.append(stream_batches(str(tmp_path / name), TOKENIZER, **sizes).fingerprint)
    assert prints[0] == prints[1] or name.endswith(".gz")  # which holds the time
    assert prints[1] != prints[2]
