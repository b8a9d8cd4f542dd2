"""The check at the start of a run finds every way in which supervision can be wrong, from the tokens alone."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_tokenizer

from lowrank.data import Example, Examples, check_fits, check_supervision, load_examples, stream_batches
from lowrank.errors import InputError

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}


def test_what_is_right_passes():
    check_supervision(load_examples([CHAT] * 3, TOKENIZER, max_length=100), TOKENIZER)
    check_supervision(Examples.of([Example([9, 10, END], [False, True, True])]), TOKENIZER)


def test_an_end_token_that_is_masked():
    examples = Examples.of([Example([9, 10, END], [False, True, True]), Example([9, 10, END], [False, True, False])])
    with pytest.raises(InputError, match=r"row 2: the row has a trained turn that does not end in a supervised end"):
        check_supervision(examples, TOKENIZER)


def test_an_end_token_that_is_masked_in_an_earlier_turn():
    ids, mask = [9, 10, END, 11, 12, END], [False, True, False, False, True, True]
    with pytest.raises(InputError, match="does not end in a supervised end token"):
        check_supervision(Examples.of([Example(ids, mask)]), TOKENIZER)


def test_rows_without_a_supervised_token_are_counted():
    examples = Examples.of([Example([9, END], [False, True]), *[Example([9, END], [False, False])] * 3])
    with pytest.raises(InputError, match=r"row 2: the row has no supervised token \(and 2 more do\)"):
        check_supervision(examples, TOKENIZER)


def test_a_turn_may_end_where_it_was_cut():
    examples = load_examples([CHAT], TOKENIZER, max_length=27, too_long="truncate")
    assert examples.report.truncated == 1
    assert examples[0].input_ids[-1] != END
    check_supervision(examples, TOKENIZER)


def test_pieces_of_a_text_may_end_anywhere():
    examples = load_examples([{"text": "x" * 500}], TOKENIZER, max_length=100, too_long="split")
    assert len(examples) == 6
    check_supervision(examples, TOKENIZER)


class TestFits:
    rows = (CHAT, {**CHAT, "messages": [*CHAT["messages"], *CHAT["messages"]]}, CHAT)

    def test_what_fits_passes(self):
        examples = load_examples(list(self.rows), TOKENIZER, max_length=200)
        check_fits(examples, TOKENIZER, int(examples.table.ids.max()) + 1, int(examples.lengths.max()))

    def test_a_token_that_the_embedding_does_not_have_is_named_with_its_row(self):
        examples = load_examples(list(self.rows), TOKENIZER, max_length=200)
        most = int(examples.table.ids.max())
        message = (
            rf"row 1: the row holds the token {most} \('.*'\), and the model's embedding has only {most} rows \(and 2"
        )
        with pytest.raises(InputError, match=message):
            check_fits(examples, TOKENIZER, most, None)

    def test_a_row_beyond_the_positions_is_named(self):
        examples = load_examples(list(self.rows), TOKENIZER, max_length=200)
        most = int(examples.lengths.max())
        message = rf"row 2: the row has {most} tokens, and the model has only {most - 1} positions\nSet data.max_length"
        with pytest.raises(InputError, match=message):
            check_fits(examples, TOKENIZER, 10**6, most - 1)

    def test_a_stream_tells_at_the_row(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, self.rows)))
        sizes = {"max_length": 200, "max_tokens": 200, "packing": True, "batch_size": 1, "pad_token_id": 0, "seed": 0}
        stream = stream_batches(str(path), TOKENIZER, **sizes)
        shortest = min(load_examples(path, TOKENIZER, max_length=200).lengths)
        assert max(stream.for_model(10**6, int(shortest)).largest().segments) == shortest
        with pytest.raises(InputError, match=rf"rows.jsonl:2: the row has .* only {shortest} positions"):
            list(stream.for_model(10**6, int(shortest)).batches(0))
