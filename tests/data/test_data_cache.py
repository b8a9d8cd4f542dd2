"""The cache gives back the same tables, and a change of anything they depend on makes new ones."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
from data_families import CHATML, IM, byte_level
from tiny import tiny_tokenizer

from lowrank.data import load_examples
from lowrank.data.loading import load, workers
from lowrank.data.loading.store import TableWriter, cache_key, forget_unused, open_table
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.tokenise import Tokeniser
from lowrank.errors import InputError, JobError

COUNT = 1200


def row(number):
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(COUNT)))
    return file


@pytest.fixture(autouse=True)
def worth_caching(monkeypatch):
    monkeypatch.setattr(load, "WORTH_CACHING", 1000)


@pytest.fixture
def tokenised(monkeypatch):
    """Counts how often rows are really tokenised."""
    calls = []
    original = load._new_table
    monkeypatch.setattr(load, "_new_table", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


def same(a, b):
    return all(np.array_equal(getattr(a.table, name), getattr(b.table, name)) for name in a.table.__slots__)


def test_a_second_start_reads_the_first_ones_tokens(path, tokenised):
    first = load_examples(path, tiny_tokenizer(), max_length=500)
    second = load_examples(path, tiny_tokenizer(), max_length=500)
    assert len(tokenised) == 1
    assert isinstance(second.table.ids, np.memmap)
    assert same(first, second)
    assert second.row(1111) == row(1111)
    assert first.report == second.report


def test_a_change_of_anything_invalidates_it(path, tokenised):
    def start(tokenizer=None, **options):
        load_examples(path, tokenizer or tiny_tokenizer(), **{"max_length": 500, **options})
        return len(tokenised)

    assert start() == 1
    assert start(max_length=400) == 2
    assert start(train_on="last_assistant") == 3
    assert start(too_long="drop") == 4
    assert start(format="messages") == 5
    assert start(max_rows=1100) == 6
    assert start(tiny_tokenizer(CHATML + "{# other #}")) == 7
    other = byte_level(IM, None, "<|im_end|>")
    other.chat_template = CHATML
    assert start(other) == 8
    with path.open("a") as file:
        file.write(json.dumps(row(1)) + "\n")
    assert start() == 9
    assert start() == 9


def test_a_template_with_the_date_in_it_is_rendered_again_the_next_day(monkeypatch):
    options = Options("assistant", 100, "error")
    dated, plain = tiny_tokenizer("{{ strftime_now('%d') }}" + CHATML), tiny_tokenizer()
    before = [cache_key("x", tokenizer, options) for tokenizer in (dated, plain)]
    monkeypatch.setattr("lowrank.data.loading.store.time.strftime", lambda form: "2031-01-01")
    after = [cache_key("x", tokenizer, options) for tokenizer in (dated, plain)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


def test_processes_give_what_one_gives(path, cache):
    one = load_examples(path, tiny_tokenizer(), max_length=500, workers=1)
    for folder in (cache / "tokens").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert same(one, load_examples(path, tiny_tokenizer(), max_length=500, workers=2))


def test_the_first_faulty_row_is_named_by_processes_too(path, cache):
    lines = path.read_text().splitlines()
    lines[700] = lines[1100] = '{"messages": 3}'
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf"{path}:701: the messages are"):
        load_examples(path, tiny_tokenizer(), max_length=500, workers=2)
    assert not list((cache / "tokens").iterdir())


def test_a_process_that_is_killed_is_told_of(path, cache, monkeypatch):
    monkeypatch.setattr(Tokeniser, "table", lambda *_: os._exit(9))
    with pytest.raises(JobError, match="a process that tokenises rows was ended from outside"):
        load_examples(path, tiny_tokenizer(), max_length=500, workers=2)
    assert not list((cache / "tokens").iterdir())


def test_a_table_is_complete_or_absent(tmp_path):
    table = load_examples([row(1)], tiny_tokenizer(), max_length=500).table
    with pytest.raises(AssertionError, match="ids is float64"), TableWriter(tmp_path / "t") as writer:
        writer.append(replace(table, ids=table.ids.astype(float)))
    assert open_table(tmp_path / "t") is None
    assert not list(tmp_path.glob("t*"))
    with TableWriter(tmp_path / "t") as writer:
        writer.append(table)
        writer.append(table)
    assert len(open_table(tmp_path / "t").ids) == 2 * len(table.ids)


def test_unused_tables_are_forgotten(tmp_path):
    for name, age in (("old", 40 * 24 * 3600), ("new", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, time.time() - age))
    forget_unused(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["new"]


def test_a_cache_that_cannot_be_written_is_told_of_and_done_without(path, tmp_path, monkeypatch):
    expected = load_examples(path, tiny_tokenizer(), max_length=500)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"the tokens are not kept .*: Not a directory.*LOWRANK_CACHE"):
        assert same(load_examples(path, tiny_tokenizer(), max_length=500), expected)


def test_a_disk_that_fills_up_is_told_of_and_done_without(path, cache, monkeypatch):
    expected = load_examples(path, tiny_tokenizer(), max_length=400, workers=1)

    def full(self, table):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TableWriter, "append", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        found = load_examples(path, tiny_tokenizer(), max_length=500)
    assert np.array_equal(found.table.ids, expected.table.ids)
    assert not list((cache / "tokens").glob("*.partial"))


def test_a_cache_that_may_only_be_read_is_read(path, tokenised, monkeypatch):
    first = load_examples(path, tiny_tokenizer(), max_length=500)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lowrank.data.loading.store.os.utime", refused)
    assert same(load_examples(path, tiny_tokenizer(), max_length=500), first)
    assert len(tokenised) == 1


def test_what_a_killed_writer_left_is_in_nobodys_way(path, cache, monkeypatch):
    folders = []
    monkeypatch.setattr("shutil.rmtree", lambda folder, **_: folders.append(folder))
    with pytest.raises(KeyboardInterrupt), TableWriter(cache / "tokens" / "killed"):
        raise KeyboardInterrupt
    monkeypatch.undo()
    monkeypatch.setenv("LOWRANK_CACHE", str(cache))
    assert folders[0].is_dir()
    with TableWriter(cache / "tokens" / "killed") as writer:  # in the same process: with the same number
        writer.append(load_examples([row(1)], tiny_tokenizer(), max_length=500).table)
    assert open_table(cache / "tokens" / "killed") is not None
    os.utime(folders[0], (0, time.time() - 2 * 24 * 3600))
    forget_unused(cache / "tokens")
    assert not folders[0].exists()


@pytest.mark.parametrize("harm", ["cut", "longer", "gone", "no sizes", "broken sizes"])
def test_a_table_that_is_not_whole_is_made_anew(path, cache, tokenised, harm):
    first = load_examples(path, tiny_tokenizer(), max_length=500)
    expected = first.table.ids.copy()
    (folder,) = (cache / "tokens").iterdir()
    file = folder / ("sizes.json" if "sizes" in harm else "supervised.bin")
    content = file.read_bytes()
    del first
    file.unlink()
    if harm not in ("gone", "no sizes"):
        file.write_bytes({"cut": content[:-3], "longer": content + b"x", "broken sizes": b"{"}[harm])
    again = load_examples(path, tiny_tokenizer(), max_length=500)
    assert np.array_equal(again.table.ids, expected)
    assert len(tokenised) == 2
    load_examples(path, tiny_tokenizer(), max_length=500)
    assert len(tokenised) == 2


def test_small_sets_leave_nothing_behind(cache):
    load_examples([row(1)], tiny_tokenizer(), max_length=500)
    assert not cache.exists()


assert workers.CHUNK_ROWS < COUNT
