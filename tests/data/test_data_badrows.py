"""Rows that cannot be used are an error that counts them, or are left out, counted and listed; columns are found."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from test_data_files import DEEP
from tiny import tiny_tokenizer

from lowrank.data import load_examples, load_train_eval, plan_batches, preview_of, stream_batches
from lowrank.data.loading import load
from lowrank.data.preview.preview_html import preview_html
from lowrank.data.preview.preview_text import preview_text
from lowrank.errors import InputError

TOKENIZER = tiny_tokenizer()
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = json.dumps({"messages": [USER, ANSWER]})
BAD = {
    "{broken": "the line is not valid JSON",
    '{"messages": 3}': "the messages are a number",
    '{"text": "Once"}': "lacks 'messages'",
    '{"messages": [{"role": "user", "text": "Hi"}]}': "says something under 'text'",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "no assistant turn",
    '{"text": ' + "1" * 5000 + "}": "Exceeds the limit",
    '{"text": ' + DEEP + "}": "nested too deeply",
    '{"text": "half \\ud83d"}': "half of a surrogate pair",
    "[1]": "not a JSON object",
}


def load_all(path, **options):
    return load_examples(path, TOKENIZER, max_length=128, **options)


def stream(path, **options):
    sizes = {"max_length": 128, "packing": True, "batch_size": 1, "max_tokens": 128, "pad_token_id": 0, "seed": 0}
    return stream_batches(str(path), TOKENIZER, **sizes, **options)


@pytest.fixture
def path(tmp_path):
    lines = [GOOD] * 400
    for at, line in enumerate(BAD):
        lines[at * 40 + 5] = line
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode("utf-8") + b'\n{"messages": "caf\xe9"}\n')
    return tmp_path / "rows.jsonl"


COUNT = len(BAD) + 1


def test_an_error_names_the_first_and_says_how_many_there_are(path):
    expected = (
        rf"rows.jsonl:6: the line is not valid JSON: .* \(and {COUNT - 1} more of 401 rows cannot be used\)"
        "\nTo leave such rows out, set data.bad_rows: skip."
    )
    with pytest.raises(InputError, match=expected):
        load_all(path)


@pytest.mark.parametrize("cached", [False, True])
def test_they_are_left_out_counted_and_the_first_ten_listed(path, monkeypatch, cached):
    monkeypatch.setattr(load, "WORTH_CACHING", 1 if cached else 10_000)
    for _ in range(2):
        examples = load_all(path, bad_rows="skip")
        assert (examples.report.rows, examples.report.examples, examples.report.bad) == (401, 401 - COUNT, COUNT)
        assert len(examples.reasons) == min(COUNT, 10)
        for reason, (at, told) in zip(examples.reasons, enumerate(BAD.values()), strict=False):
            assert reason.startswith(f"{path}:{at * 40 + 6}: ")
            assert told in reason
    with pytest.raises(InputError, match="cannot be used"):
        load_all(path)


def test_more_than_a_twentieth_are_refused(path):
    path.write_text("\n".join([GOOD] * 18 + ["{broken"] * 2))
    with pytest.raises(
        InputError, match=r"2 of 20 rows cannot be used; more than 5% are not skipped:\n  .*:19: the line"
    ):
        load_all(path, bad_rows="skip")
    path.write_text("\n".join(["{broken"] + [GOOD] * 19))
    assert load_all(path, bad_rows="skip").report.bad == 1


def test_a_bad_row_leaves_nothing_of_itself_behind(path):
    path.write_text("\n".join([GOOD] * 5))
    whole = load_all(path)
    path.write_text("\n".join(["{broken", *[GOOD] * 19, *[GOOD] * 5]))
    left = load_all(path, bad_rows="skip")
    assert [left[at] for at in range(5)] == [whole[at] for at in range(5)]
    assert left.rows.where(int(left.table.example_rows[0])) == f"{path}:2"


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_count_the_same(path, workers):
    examples = load_all(path, bad_rows="skip", workers=workers)
    assert (examples.report.bad, len(examples)) == (COUNT, 401 - COUNT)


def test_cells_too_many_are_a_bad_row(tmp_path):
    body = ["prompt,completion", "a,b,c", *["a,b"] * 30]
    (tmp_path / "rows.csv").write_text("\n".join(body))
    examples = load_all(tmp_path / "rows.csv", bad_rows="skip")
    assert examples.reasons == [f"{tmp_path}/rows.csv:2: the row has 3 cells, the header 2"]
    with pytest.raises(InputError, match="the row has 3 cells"):
        load_all(tmp_path / "rows.csv")


def test_a_stream_skips_counts_and_refuses_too(path):
    with pytest.raises(InputError, match=r"rows.jsonl:6: the line is not valid JSON"):
        list(stream(path).batches(0))
    left = stream(path, bad_rows="skip")
    assert sum(len(batch.segments) for batch in left.batches(0)) == 401 - COUNT
    assert (left.counts.bad, len(left.counts.reasons)) == (COUNT, min(COUNT, 10))
    assert f"{COUNT} bad" in str(left.counts)
    list(left.batches(1))
    assert len(set(left.counts.reasons)) == len(left.counts.reasons) == min(COUNT, 10)
    path.write_text("\n".join([GOOD] * 900 + ["{broken"] * 100))
    with pytest.raises(InputError, match=r"100 of 1,000 rows cannot be used; more than 5%"):
        list(stream(path, bad_rows="skip").batches(0))


def test_they_are_on_no_side_of_a_split(path):
    lines = [json.dumps({"messages": [{**USER, "content": f"q{number}"}, ANSWER]}) for number in range(200)]
    path.write_text("\n".join(["{broken", *lines]))
    train, held_out = load_train_eval(str(path), 0.3, TOKENIZER, max_length=128, bad_rows="skip")
    assert len(train) + len(held_out) == 200
    assert train.report.bad + held_out.report.bad == 1


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "completion", "all"])
def test_rows_whose_marks_leave_nothing_are_left_out_and_counted(train_on):
    marked = {"messages": [{**USER, "train": False}, {**ANSWER, "train": False}]}
    rows = [marked, {"messages": [USER, ANSWER]}, marked]
    report = load_examples(rows, TOKENIZER, max_length=128, train_on=train_on).report
    assert (report.rows, report.examples, report.marked) == (3, 1, 2)
    with pytest.raises(InputError, match="1 say of every turn that it carries no loss"):
        load_examples([marked], TOKENIZER, max_length=128, train_on=train_on)


def test_a_preview_shows_what_was_left_out(path):
    plan = plan_batches(
        load_all(path, bad_rows="skip"), packing=False, batch_size=2, max_tokens=None, pad_token_id=0, seed=0
    )
    shown = preview_of(plan, TOKENIZER)
    assert dict(shown.figures)["rows that cannot be used, left out"] == str(COUNT)
    console = Console(record=True, width=200)
    console.print(preview_text(shown))
    for page in (console.export_text(), preview_html(shown)):
        assert f"{path}:6: the line is not valid JSON" in page
    with pytest.raises(InputError, match="nothing of row 6 is trained on: it cannot be used"):
        preview_of(plan, TOKENIZER, row=6)


class TestColumns:
    ROWS = [{"asked": "Hi", "said": " Hello", "prompt": "no", "messages": [USER, ANSWER], "answer": "no"}] * 3
    NAMES = {"prompt": "asked", "completion": "said"}  # noqa: RUF012

    def test_any_names(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, self.ROWS)))
        expected = load_all([{"prompt": "Hi", "completion": " Hello"}] * 3)
        source = tmp_path / "rows.jsonl"
        sources = (self.ROWS, source, [{"path": str(source), "columns": self.NAMES}])
        for given in sources:
            found = load_all(given, columns=None if given is sources[2] else self.NAMES)
            assert list(found) == list(expected)
            assert found.row(0) == {"prompt": "Hi", "completion": " Hello"}
        streamed = next(stream(source, columns=self.NAMES).batches(0))
        assert streamed.input_ids[0, : len(expected[0].input_ids)].tolist() == expected[0].input_ids

    def test_messages_and_system_turns(self):
        rows = [{"chat": [USER, ANSWER], "rules": "Be brief"}]
        found = load_all(rows, columns={"messages": "chat", "system": "rules"})
        assert list(found) == list(load_all([{"messages": [USER, ANSWER], "system": "Be brief"}]))

    def test_other_names_are_another_set(self):
        rows = [{"a": "1", "b": "2", "c": "3"}] * 3
        one, two = (load_all(rows, columns={"prompt": "a", "completion": key}) for key in ("b", "c"))
        assert one.rows.fingerprint != two.rows.fingerprint

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"promt": "asked"}, r"data.columns: no format has a column 'promt'\nKnown are anchor, chosen, completion"),
            ({"prompt": "asked", "output": "said"}, r"data.columns: no format has all of prompt, output"),
            ({"prompt": "asked", "completion": "sayd"}, r"there is no column 'sayd', which data.columns gives for"),
        ],
    )
    def test_names_that_are_not_there(self, columns, message):
        with pytest.raises(InputError, match=message):
            load_all(self.ROWS, columns=columns)
