"""The check at the start of a run finds every way in which supervision can be wrong, from the tokens alone."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer

from lowrank.data import Example, Examples, check_supervision, load_examples
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
