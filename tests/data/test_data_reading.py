"""Every kind of source gives the same examples, every fault is named with its place, every row is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
from tiny import tiny_tokenizer

from lowrank.data import Source, load_examples, load_train_eval, stream_batches
from lowrank.data.loading.load import first_rows, split_by_hash
from lowrank.data.reading.rows import JsonLines
from lowrank.data.reading.sources import Joined, open_sources
from lowrank.errors import InputError

TOKENIZER = tiny_tokenizer()


def chat(number, words=3):
    answer = " ".join([f"answer{number}"] * words)
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]}


ROWS = [chat(number) for number in range(20)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, **options):
    return load_examples(source, TOKENIZER, **{"max_length": 10_000, **options})


class TestSources:
    def test_every_kind_gives_the_same_examples(self, tmp_path):
        table = datasets.Dataset.from_list(ROWS)
        table.save_to_disk(str(tmp_path / "saved"))
        datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(str(tmp_path / "both"))
        table.to_parquet(str(tmp_path / "rows.parquet"))
        flat = [{"messages": json.dumps(row["messages"])} for row in ROWS]
        datasets.Dataset.from_list(flat).to_csv(str(tmp_path / "rows.csv"))
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        (tmp_path / "data.json").write_text(json.dumps({"data": ROWS}))
        write_lines(tmp_path / "rows.jsonl", ROWS)
        expected = list(load(ROWS))
        for name in ("rows.jsonl", "rows.json", "data.json", "rows.csv", "rows.parquet", "saved", "both"):
            assert list(load(tmp_path / name)) == expected, name
        assert list(load(table)) == expected
        assert len(load({"path": str(tmp_path / "both"), "split": "test"})) == 3

    def test_tables_do_not_fill_tool_calls_with_nothing(self, tmp_path):
        calls = [
            {"function": {"name": "add", "arguments": {"a": 1}}},
            {"function": {"name": "say", "arguments": {"text": "x"}}},
        ]
        rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
        read = Joined(open_sources(str(tmp_path / "rows.parquet")))
        assert read.read(0, 2) == rows == [read[0], read[1]]

    def test_text_files(self, tmp_path):
        (tmp_path / "b.txt").write_text("Second é")
        (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfFirst")  # as some editors mark UTF-8
        (tmp_path / "ignored.py").write_text("x")
        examples = load(tmp_path)
        assert [TOKENIZER.decode(example.input_ids) for example in examples] == [
            "First<|im_end|>",
            "Second é<|im_end|>",
        ]
        assert len(load(tmp_path / "b.txt")) == 1

    def test_several_sources_follow_one_another(self, tmp_path):
        first = write_lines(tmp_path / "a.jsonl", ROWS[:5])
        (tmp_path / "b.json").write_text(json.dumps([{"text": "Once"}]))
        examples = load([first, str(tmp_path / "b.json")])
        assert len(examples) == 6
        assert examples.row(5) == {"text": "Once"}
        assert examples.rows.where(4) == f"{first}:5"

    def test_max_rows_takes_from_every_source(self, tmp_path):
        paths = [write_lines(tmp_path / f"{n}.jsonl", ROWS[n * 5 : n * 5 + 5]) for n in range(2)]
        assert [examples["messages"][0]["content"] for examples in map(load(paths, max_rows=4).row, range(4))] == [
            "q0", "q1", "q5", "q6",
        ]  # fmt: skip

    def test_no_row_has_to_fit_in_memory_twice(self):
        examples = load(ROWS)
        assert examples.table.ids.dtype == np.int32
        assert examples.arrays(0)[0].base is not None


def test_line_breaks_are_found_whatever_the_block(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    content = Path(path).read_bytes()
    whole = [dict(row) for row in JsonLines(content, path).read(0, len(ROWS))]
    monkeypatch.setattr("lowrank.data.reading.rows.BLOCK_BYTES", 7)
    assert len(JsonLines(content, path)) == len(ROWS)
    assert JsonLines(content, path).read(0, len(ROWS)) == whole == ROWS


class TestHub:
    def test_a_name_that_is_no_file_is_asked_for_there(self, monkeypatch):
        asked = []

        def load_dataset(path, subset, *, split, **more):
            asked.append((path, subset, split, more.get("streaming", False)))
            rows = datasets.Dataset.from_list(ROWS)
            return rows.to_iterable_dataset() if more.get("streaming") else rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = Source("someone/chats", split="dev", subset="small")
        examples = load(source)
        assert len(examples) == len(ROWS)
        assert examples.rows.where(2) == "someone/chats (dev) row 3"
        stream = stream_batches(source, TOKENIZER, max_length=99, packing=True, batch_size=1, max_tokens=99,
                                pad_token_id=0, seed=0)  # fmt: skip
        assert sum(len(batch.segments) for batch in stream.batches(0)) == len(ROWS)
        assert asked == [("someone/chats", "small", "dev", False), ("someone/chats", "small", "dev", True)]

    def test_what_is_not_there_either(self, monkeypatch):
        def load_dataset(*_, **__):
            raise FileNotFoundError("Couldn't reach the hub")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(InputError, match=r"'someone/chats' is no file here, .*: Couldn't reach the hub"):
            load("someone/chats")


class TestFaults:
    def test_no_such_file(self):
        with pytest.raises(InputError, match=r"there is no such file: missing\.jsonl"):
            load("missing.jsonl")

    def test_an_unknown_kind(self, tmp_path):
        (tmp_path / "rows.xls").write_text("x")
        with pytest.raises(InputError, match=r"rows.xls: cannot read such files\nKnown endings: .jsonl"):
            load(tmp_path / "rows.xls")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match="neither a saved data set nor files with rows"):
            load(tmp_path)

    @pytest.mark.parametrize("content", ["", "\n\n", "[]"])
    def test_an_empty_file(self, tmp_path, content):
        path = tmp_path / ("rows.json" if content == "[]" else "rows.jsonl")
        path.write_text(content)
        with pytest.raises(InputError, match="there are no rows"):
            load(path)

    def test_a_line_that_is_not_json_is_named(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(ROWS[0]) + "\n{not json\n")
        with pytest.raises(InputError, match=rf"{path}:2: the line is not valid JSON"):
            load(path)

    def test_a_faulty_row_is_named_by_file_and_line(self, tmp_path):
        path = write_lines(tmp_path / "rows.jsonl", [*ROWS[:7], {"messages": ROWS[0]["messages"][:1]}])
        with pytest.raises(InputError, match=rf"{path}:8: the conversation has no assistant turn"):
            load(path)

    def test_an_unknown_field_of_a_source(self):
        with pytest.raises(InputError, match=r"a source has no 'wieght'\nKnown: path, format, weight"):
            load({"path": "x.jsonl", "wieght": 2})

    def test_a_split_that_is_not_there(self, tmp_path):
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "both"))
        with pytest.raises(InputError, match=r"has no split 'dev'\nSplits: \['train'\]"):
            load({"path": str(tmp_path / "both"), "split": "dev"})


class TestCounts:
    def test_empty_rows_and_duplicates(self, tmp_path):
        empty = [{}, {"messages": []}, {"messages": None}, {"messages": [{"role": "user", "content": " "}]}]
        blank_answer = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
        path = write_lines(tmp_path / "rows.jsonl", [*ROWS[:3], *empty, blank_answer, ROWS[1], ROWS[1]])
        report = load(path).report
        assert (report.rows, report.examples, report.empty, report.duplicates) == (10, 5, 5, 2)

    def test_tokens(self):
        examples = load(ROWS)
        report = examples.report
        assert report.tokens == sum(len(example.input_ids) for example in examples)
        assert report.supervised_tokens == sum(sum(example.supervised) for example in examples)
        lengths = [len(example.input_ids) for example in examples]
        assert (report.lengths.shortest, report.lengths.longest) == (min(lengths), max(lengths))
        assert sum(report.lengths.counts) == len(examples)
        assert report.lengths.median == round(float(np.median(lengths)))


class TestTooLong:
    rows = (chat(1), chat(2, words=50), chat(3), chat(4, words=60))
    long_question: ClassVar = {
        "messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    }

    def test_error_names_the_first_and_counts_all(self, tmp_path):
        path = write_lines(tmp_path / "rows.jsonl", self.rows)
        with pytest.raises(InputError, match=rf"{path}:2: 2 of 4 rows are longer than data.max_length = 100 tokens"):
            load(path, max_length=100)

    def test_drop(self):
        examples = load(list(self.rows), max_length=100, too_long="drop")
        assert (len(examples), examples.report.dropped, examples.report.truncated) == (2, 2, 0)
        assert examples.row(1) == chat(3)

    def test_truncate_never_leaves_nothing_to_learn(self):
        examples = load([*self.rows, self.long_question], max_length=100, too_long="truncate")
        assert (len(examples), examples.report.dropped, examples.report.truncated) == (4, 1, 2)
        assert max(examples.lengths) == 100
        assert all(any(example.supervised) for example in examples)
        assert examples[1].input_ids == load([self.rows[1]])[0].input_ids[:100]

    def test_split_cuts_text_so_that_each_token_is_learned_once(self):
        text = {"text": "".join(map(str, range(100)))}
        whole = load([text])[0]
        pieces = load([text], max_length=64, too_long="split")
        assert max(pieces.lengths) == 64
        learned = [t for p in pieces for t, s in zip(p.input_ids, p.supervised, strict=True) if s]
        assert learned == whole.input_ids[1:]
        assert pieces.report.split == 1

    @pytest.mark.parametrize("train_on", ["assistant", "all"])
    def test_split_does_not_cut_conversations(self, train_on):
        with pytest.raises(InputError, match=r"2 of 4 rows are longer"):
            load(list(self.rows), max_length=100, too_long="split", train_on=train_on)

    def test_nothing_left(self):
        with pytest.raises(InputError, match="no examples are left: 0 of 1 rows are empty, 1 too long"):
            load([self.rows[1]], max_length=100, too_long="drop")


class TestMixing:
    def paths(self, tmp_path, *sizes):
        rows = iter([chat(number) for number in range(sum(sizes))])
        return [write_lines(tmp_path / f"{n}.jsonl", [next(rows) for _ in range(size)]) for n, size in enumerate(sizes)]

    def test_shares_follow_the_weights(self, tmp_path):
        paths = self.paths(tmp_path, 30, 90)
        mix = load([{"path": paths[0], "weight": 3}, Source(paths[1], weight=1.0)])
        owners = np.array([mix.rows.parts_of(mix.table.example_rows[mix.order])])
        assert len(mix) == 120
        assert [(owners == part).sum() for part in range(2)] == [90, 30]
        counts = np.bincount(mix.order, minlength=120)
        assert set(counts[:30]) == {3}
        assert set(counts[30:]) == {0, 1}
        assert mix.report.duplicates == 0

    def test_half_a_weighting_is_refused(self, tmp_path):
        paths = self.paths(tmp_path, 2, 2)
        with pytest.raises(InputError, match="some sources have a weight, others none"):
            load([{"path": paths[0], "weight": 3}, paths[1]])


class TestEvalShare:
    def split(self, rows, share=0.25):
        return load_train_eval(rows, share, TOKENIZER, max_length=1000)

    def questions(self, examples):
        return {examples.row(at)["messages"][0]["content"] for at in range(len(examples))}

    def test_a_share_is_set_aside(self):
        train, held_out = self.split([chat(number) for number in range(400)])
        assert len(train) + len(held_out) == 400
        assert abs(len(held_out) - 100) < 40
        assert not self.questions(train) & self.questions(held_out)
        assert (train.report.rows, held_out.report.rows) == (len(train), len(held_out))

    def test_it_stays_put_when_rows_are_added_or_moved(self):
        rows = [chat(number) for number in range(100)]
        _, before = self.split(rows)
        _, after = self.split([*(chat(number) for number in range(500, 550)), *reversed(rows)])
        assert self.questions(before) == {q for q in self.questions(after) if int(q[1:]) < 500}

    @pytest.mark.parametrize("share", [1e-9, 0.05, 0.25, 0.5, 0.95])
    def test_of_few_rows_each_side_gets_half_of_its_share_at_least(self, share):
        whole = load_examples([chat(number) for number in range(200)], TOKENIZER, max_length=1000)
        for count in range(2, 201):
            kept, aside = split_by_hash(first_rows(whole, count), share)
            assert len(kept) + len(aside) == count
            assert len(aside) >= max(1, int(count * share / 2))
            assert len(kept) >= max(1, int(count * (1 - share) / 2))
            assert not set(kept.order) & set(aside.order)

    def test_of_many_rows_it_is_the_hash_that_decides(self):
        whole = load_examples([chat(number) for number in range(1000)], TOKENIZER, max_length=1000)
        _, aside = split_by_hash(whole, 0.1)
        assert aside.order.tolist() == np.flatnonzero(whole.table.row_keys < np.uint64(int(0.1 * 2**64))).tolist()

    def test_equal_rows_are_on_one_side(self):
        rows = [chat(number) for number in range(100)] * 2
        train, held_out = self.split(rows)
        assert not self.questions(train) & self.questions(held_out)

    def test_a_side_without_rows_is_refused(self):
        with pytest.raises(InputError, match="of 2 rows, all usable ones the same, none can be set aside"):
            self.split([chat(1), chat(1)], 0.5)
        with pytest.raises(InputError, match="a share of 3 cannot be set aside"):
            self.split([chat(1), chat(2)], 3)

    def test_a_source_of_its_own_and_none(self, tmp_path):
        path = write_lines(tmp_path / "eval.jsonl", ROWS[:4])
        train, held_out = load_train_eval(ROWS, path, TOKENIZER, max_length=1000, max_train_rows=7, max_eval_rows=3)
        assert (len(train), len(held_out)) == (7, 3)
        assert load_train_eval(ROWS, None, TOKENIZER, max_length=1000)[1] is None

    def test_max_eval_rows_of_a_share(self):
        rows = [chat(number) for number in range(100)]
        _, held_out = load_train_eval(rows, 0.3, TOKENIZER, max_length=1000, max_eval_rows=5)
        assert len(held_out) == held_out.report.rows == 5
