"""Streams: the same examples as loading, packed from a buffer, resumed by reading again; and batches made ahead."""

from __future__ import annotations

import json
import threading
import time
from itertools import islice

import datasets
import pytest
import torch
from tiny import tiny_tokenizer

from lowrank.data import Example, Examples, Prefetched, load_examples, plan_batches, stream_batches
from lowrank.errors import InputError

TOKENIZER = tiny_tokenizer()


def row(number):
    answer = f"a{number} " * (1 + number * 7919 % 23)
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer + "."}]}


ROWS = [row(number) for number in range(300)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def stream(source, **options):
    defaults = {"max_length": 256, "packing": True, "batch_size": 4, "max_tokens": 256, "pad_token_id": 0, "seed": 3}
    return stream_batches(source, TOKENIZER, **{**defaults, "buffer": 64, **options})


def segments_of(batches):
    """The token ids of every segment (or row) of every batch."""
    found = []
    for batch in batches:
        if batch.segments is None:
            found += [r[m.bool()].tolist() for r, m in zip(batch.input_ids, batch.attention_mask, strict=True)]
        else:
            found += [part.tolist() for part in batch.input_ids[0].split(batch.segments)]
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_example_once(path, packing):
    expected = [example.input_ids for example in load_examples(path, TOKENIZER, max_length=256)]
    for epoch in range(2):
        assert sorted(segments_of(stream(path, packing=packing).batches(epoch))) == sorted(expected)


def test_packs_are_full_before_the_last_buffer(path):
    batches = list(stream(path).batches(0))
    assert sum(batch.tokens for batch in batches) / (256 * len(batches)) > 0.93


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch_and_resumes_anywhere(path, packing):
    whole = segments_of(stream(path, packing=packing).batches(0))
    assert segments_of(stream(path, packing=packing).batches(0)) == whole
    assert segments_of(stream(path, packing=packing).batches(1)) != whole
    assert segments_of(stream(path, packing=packing, seed=4).batches(0)) != whole
    first = segments_of(islice(stream(path, packing=packing).batches(0), 7))
    assert first + segments_of(stream(path, packing=packing).batches(0, start=7)) == whole


def test_rows_are_read_only_as_far_as_they_are_needed(path):
    path.write_text(path.read_text() + "{broken\n")
    batches = stream(path).batches(0)
    assert next(batches).tokens > 0
    with pytest.raises(InputError, match=rf"{path}:301: the line is not valid JSON"):
        list(batches)


def test_the_next_buffer_is_read_while_this_ones_packs_are_used(path):
    ready = stream(path)
    before = threading.active_count()
    batches = ready.batches(0)
    next(batches)
    until = time.monotonic() + 10
    while ready.counts.rows < 2 * ready.buffer and time.monotonic() < until:
        time.sleep(0.01)
    assert 2 * ready.buffer <= ready.counts.rows < len(ROWS)
    batches.close()
    assert threading.active_count() == before


def test_other_sources_stream_the_same(path, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    expected = segments_of(stream(path).batches(0))
    for name in ("rows.parquet", "saved"):
        assert segments_of(stream(str(tmp_path / name)).batches(0)) == expected


def test_weights_are_the_odds_of_a_source(path, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(300)))
    mixed = stream([{"path": str(path), "weight": 1}, {"path": str(tmp_path / "text.jsonl"), "weight": 4}])
    texts = [TOKENIZER.decode(ids) for ids in segments_of(mixed.batches(0))]
    share = sum(text.startswith("t") for text in texts) / len(texts)
    assert share == pytest.approx(0.8, abs=0.06)


def test_a_buffer_of_empty_rows_is_passed_over_and_counted(path):
    path.write_text(path.read_text() + "\n" * 70)
    batches = stream(path)
    assert len(segments_of(batches.batches(0))) == 300
    assert (batches.counts.rows, batches.counts.examples, batches.counts.empty) == (370, 300, 70)
    assert str(batches.counts) == "370 rows read, 70 empty"


def test_what_is_cut_and_dropped_is_counted(path):
    batches = stream(path, max_length=64, too_long="truncate")
    list(batches.batches(0))
    report = load_examples(path, TOKENIZER, max_length=64, too_long="truncate").report
    assert report.truncated > 3
    assert (batches.counts.truncated, batches.counts.dropped) == (report.truncated, report.dropped)
    batches = stream(path, max_length=64, too_long="drop")
    list(batches.batches(0))
    assert batches.counts.dropped == report.truncated + report.dropped


def test_the_format_is_that_of_the_first_row_all_through(path):
    path.write_text(path.read_text() + "".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(64)))
    with pytest.raises(InputError, match=r"rows.jsonl:301: the row has 'text', but lacks 'messages'"):
        list(stream(path, buffer=50).batches(0))
    with pytest.raises(InputError, match="there is no format 'chatml'"):
        stream(path, format="chatml")


def test_every_rows_supervision_is_proved_when_it_is_read(path):
    no_end = tiny_tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
        "{{ '' if 'a40' in m['content'] else '<|im_end|>' }}{% endfor %}"
    )
    batches = stream_batches(
        path, no_end, max_length=256, packing=True, batch_size=1, max_tokens=256, pad_token_id=0, seed=0, buffer=20
    ).batches(0)
    next(batches)
    with pytest.raises(InputError, match=r"rows.jsonl:41: .*would not learn to stop"):
        list(batches)


def test_a_sample_reads_no_more_than_it_shows(path, tmp_path):
    path.write_text(path.read_text() + "{broken\n")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(20)))
    sample = stream([str(path), str(tmp_path / "text.jsonl")]).sample(30)
    assert sample.report.rows == 30
    assert sample.row(14) == ROWS[14]
    assert sample.row(15) == {"text": "t0"}
    assert sample.rows.where(15) == f"{tmp_path}/text.jsonl:1"


@pytest.mark.parametrize(
    ("damaged", "message"),
    [(slice(-300, None), "cannot be read as Parquet"), (slice(4, 300), "cannot be read on from row 1")],
    ids=["footer", "pages"],
)
def test_a_damaged_file_is_named(tmp_path, damaged, message):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[damaged] = b"x" * len(content[damaged])
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(InputError, match=rf"rows.parquet: {message}"):
        list(stream(str(tmp_path / "rows.parquet")).batches(0))


def test_too_long_is_raised_at_the_row(path):
    with pytest.raises(InputError, match=r"rows.jsonl:\d+: the row has \d+ tokens, more than data.max_length = 64"):
        list(stream(path, max_length=64).batches(0))
    assert len(list(stream(path, max_length=64, too_long="drop").batches(0))) > 3


def test_packs_smaller_than_examples_are_refused(path):
    with pytest.raises(InputError, match="examples of up to 300 tokens do not fit into packs of 256"):
        stream(path, max_length=300)


class TestPrefetched:
    def plan(self):
        examples = Examples.of([Example([n + 1] * 5, [False] + [True] * 4) for n in range(50)])
        return plan_batches(examples, packing=False, batch_size=2, max_tokens=None, pad_token_id=0, seed=0)

    def test_the_same_batches_in_the_same_order(self):
        with Prefetched(self.plan().batches(0)) as batches:
            got = [batch.input_ids for batch in batches]
        assert len(got) == 25
        assert all(torch.equal(a, b.input_ids) for a, b in zip(got, self.plan().batches(0), strict=True))

    def test_an_error_is_raised_where_the_batch_is_asked_for(self):
        def broken():
            yield from self.plan().batches(0, start=24)
            raise InputError("bad row")

        batches = Prefetched(broken())
        next(batches)
        with pytest.raises(InputError, match="bad row"):
            next(batches)

    def test_closing_stops_the_thread(self):
        before = threading.active_count()
        batches = Prefetched(self.plan().batches(0), depth=2)
        next(batches)
        batches.close()
        assert threading.active_count() == before
        assert list(batches) == []

    @pytest.mark.slow  # it is timed
    def test_the_model_waits_for_less_than_one_percent_of_its_steps(self):
        examples = Examples.of([Example([n % 200] * 256, [False] + [True] * 255) for n in range(400)])
        plan = plan_batches(examples, packing=True, batch_size=1, max_tokens=1024, pad_token_id=0, seed=0)
        batches = Prefetched(plan.batches(0))
        next(batches)
        batches.blocked = 0.0
        started = time.perf_counter()
        for _ in batches:
            time.sleep(0.01)  # a step of a very small model
        assert batches.blocked < 0.01 * (time.perf_counter() - started)
