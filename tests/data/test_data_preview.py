"""The preview shows each token once, marked as it is trained, in the terminal and as a page."""

from __future__ import annotations

import re
from html import unescape
from io import StringIO

import pytest
from data_families import FAMILIES
from rich.console import Console
from tiny import tiny_tokenizer

from lowrank.data import load_examples, plan_batches, preview_html, preview_of, preview_text
from lowrank.data.preview.token_text import pieces
from lowrank.errors import InputError


def row(number, answer="Hello 日本 😀 <b>"):
    return {"messages": [{"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": answer}]}


def planned(rows, packing=True, tokenizer=None, share=False):
    tokenizer = tokenizer or tiny_tokenizer()
    examples = load_examples(rows, tokenizer, max_length=200, too_long="drop")
    plan = plan_batches(
        examples, packing=packing, batch_size=4, max_tokens=400, pad_token_id=0, seed=0, share_prefixes=share
    )
    return plan, tokenizer


def printed(shown, colour=False):
    console = Console(file=StringIO(), width=120, force_terminal=colour, color_system="standard" if colour else None)
    console.print(preview_text(shown))
    return console.file.getvalue()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_pieces_put_together_are_the_text(family):
    tokenizer = family.make()
    text = tokenizer.apply_chat_template(row(1)["messages"], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(ids, [False] * len(ids), tokenizer)
    shown = "".join(piece.text for piece in found)
    assert shown == tokenizer.decode(ids) or family.name == "mistral"
    assert "日本" in shown
    assert "😀" in shown
    assert len(found) > 10


def test_supervised_tokens_are_coloured_and_the_rest_is_dim():
    shown = preview_of(*planned([row(1)]))
    assert "".join(piece.text for piece in shown.shown[0].pieces if piece.supervised) == "Hello 日本 😀 <b><|im_end|>"
    coloured = printed(shown, colour=True)
    green = "".join(re.findall(r"\x1b\[1;30;(?:42|102)m([^\x1b]*)\x1b", coloured))
    assert green == "supervisedHello 日本 😀 <b><|im_end|>"


def test_a_pack_is_shown_with_the_borders_of_its_segments():
    plan, tokenizer = planned([row(number) for number in range(12)])
    shown = preview_of(plan, tokenizer, count=2)
    text = printed(shown)
    assert shown.packed
    assert re.search(r"segment 1: rows row \d+, \d+ tokens, \d+ supervised ─", text)
    assert "segment 2" in text
    assert f"... and {len(plan.epoch(0)[0]) - 2} more" in text
    assert '<div class="pack">' in preview_html(shown)


def test_a_pack_whose_examples_begin_alike_is_drawn_as_a_tree():
    system = {"role": "system", "content": "Answer with <b> and nothing else, whatever you may be asked."}
    rows = [{"messages": [system, *row(number)["messages"]]} for number in range(3)]
    plan, tokenizer = planned(rows, share=True)
    shown = preview_of(plan, tokenizer)
    (branch,) = shown.tree
    assert re.match(r"\d+ tokens of 3 examples: .*Answer with <b> and", branch.told)
    assert [bool(re.match(r"\d+ tokens: \d.*Hello", child.told)) for child in branch.branches] == [True] * 3
    text, page = printed(shown), preview_html(shown)
    assert re.search(r"the first pack, as a tree\n└── \d+ tokens of 3 examples: .*\n    ├── \d+ tokens: ", text)
    assert "example 3: " in text
    assert re.search(rf"^tokens that go through the model +{plan.passing()} *$", text, re.MULTILINE)
    assert "Answer with &lt;b&gt; and" in page
    assert page.count("<li>") == 4


def test_the_table():
    long = row(99, "x" * 500)
    plan, tokenizer = planned([*(row(number) for number in range(10)), row(1), {}, long])
    text = printed(preview_of(plan, tokenizer, steps_per_epoch=7))
    report = plan.examples.report
    for label, value in {
        "rows": 13,
        "examples": 11,
        "dropped as too long": 1,
        "empty rows": 1,
        "duplicates": 1,
        "packing efficiency": f"{plan.fill():.1%}",
        "supervised": f"{report.supervised_tokens} ({report.supervised_share:.1%})",
        "packs per epoch": len(plan.epoch(0)),
        "steps per epoch": 7,
    }.items():
        assert re.search(rf"^{label} +{re.escape(str(value))} *$", text, re.MULTILINE), (label, text)
    assert "█" in text


def test_control_characters_are_shown_and_not_obeyed():
    shown = preview_of(*planned([row(1, "a\tb\r\n\x1b[2Jc\x00")]))
    for text in (printed(shown), unescape(re.sub(r"</?(span|i)[^>]*>", "", preview_html(shown)))):
        assert "a␉b␍↵\n␛[2Jc␀<|im_end|>" in text


def test_of_a_stream_it_does_not_say_how_long_an_epoch_is():
    text = printed(preview_of(*planned([row(number) for number in range(12)]), of_stream=True))
    assert "the first pack of the stream's first rows, token by token" in text
    assert re.search(r"^rows looked at, the first of a stream +12 *$", text, re.MULTILINE)
    assert "per epoch" not in text


def test_one_row_by_its_number():
    plan, tokenizer = planned([row(0), {}, row(2)])
    shown = preview_of(plan, tokenizer, row=3)
    assert [segment.place for segment in shown.shown] == ["rows row 3"]
    with pytest.raises(InputError, match=r"there is no row 4\nRows are 1 to 3"):
        preview_of(plan, tokenizer, row=4)
    with pytest.raises(InputError, match="nothing of row 2 is trained on"):
        preview_of(plan, tokenizer, row=2)


def test_the_page_says_the_same_and_needs_nothing_else():
    shown = preview_of(*planned([row(1), row(2)], packing=False))
    page = preview_html(shown)
    assert not re.search(r"(src|href)=|@import|<script", page)
    examples = re.findall(r'<div class="example">(.*?)</div>', page, re.DOTALL)
    assert len(examples) == 2
    on = "".join(re.findall(r'<span class="on">(.*?)</span>', examples[0], re.DOTALL))
    assert unescape(on) == "Hello 日本 😀 <b><|im_end|>"
    for label, value in shown.figures:
        assert f"<td>{label}</td><td>{value}</td>" in page
