"""Rows as users of a family have them, against what TRL trains on them: the same text, and no turn lost."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest
from data_families import TOOLS, byte_level

from lowrank.data import check_supervision, load_examples
from lowrank.errors import InputError

found = importlib.util.find_spec("trl")
TEMPLATES = Path(found.submodule_search_locations[0]) / "chat_templates" if found else Path("none")
MARKERS = re.compile(
    r"<\|[a-zA-Z_0-9]+\|>|<[a-z]+_of_[a-z]+>|<｜[^｜]+｜>|\[gMASK\]|<sop>"
    r"|<\|?(?:turn|tool_response|tool_call|channel)\|?>"
)
pytestmark = pytest.mark.skipif(not TEMPLATES.exists(), reason="this version of TRL has no chat templates")


def user(content):
    return {"role": "user", "content": content}


def answer(content=None, **more):
    return {"role": "assistant", **({} if content is None else {"content": content}), **more}


def call(arguments):
    return {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "sunny"}
THOUGHT = "<think>\nI should greet.\n</think>\n\nHello."
ROWS = {
    "one turn": {"messages": [user("Hi é"), answer("Hello 日本 😀.")]},
    "two turns": {"messages": [user("Hi"), answer("Hello."), user("More"), answer("Fine,\n\nthanks")]},
    "system": {"messages": [{"role": "system", "content": "Be nice."}, user("Hi"), answer("Hello.")]},
    "code": {"messages": [user("Hi"), answer("\n  def f():\n    pass\n")]},
    "reasoning": {"messages": [user("Hi"), answer("Hello.", reasoning_content="I should greet.")]},
    "think": {"messages": [user("Hi"), answer(THOUGHT)]},
    "think in a line": {"messages": [user("Hi"), answer("<think>I should greet.</think>Hello.")]},
    "think twice": {"messages": [user("Hi"), answer(THOUGHT), user("More"), answer(THOUGHT)]},
    "call": {"messages": [user("Weather?"), answer(tool_calls=[call({"city": "Paris"})])], "tools": TOOLS},
    "call and answer": {
        "messages": [user("Weather?"), answer(tool_calls=[call({"city": "Paris"})]), RESULT, answer("It is sunny.")],
        "tools": TOOLS,
    },
    "call with a thought": {
        "messages": [
            user("Weather?"),
            answer(reasoning_content="I must look.", tool_calls=[call({"city": "Paris"})]),
            RESULT,
            answer("It is sunny.", reasoning_content="I have it."),
        ],
        "tools": TOOLS,
    },
}
PLAIN = ["one turn", "two turns", "system", "code"]
THINKING = [*PLAIN, "reasoning", "think", "think in a line", "think twice"]
CALLING = ["call", "call and answer"]
TAKES = {
    "deepseek_r1_distill": THINKING,
    "deepseekv3": PLAIN,
    "glm4moe": [*THINKING, *CALLING, "call with a thought"],
    "nemotron_3_nano": [*THINKING, *CALLING, "call with a thought"],
    "nemotron_3_ultra": [*THINKING, *CALLING, "call with a thought"],
    "qwen3": [*THINKING, *CALLING, "call with a thought"],
    "qwen3_5_think": [*THINKING, *CALLING, "call with a thought"],
    "qwen3_5_nothink": [*THINKING, *CALLING, "call with a thought"],
    "qwen3_8": [*THINKING, *CALLING, "call with a thought"],
    "qwen3_instruct_2507": [*PLAIN, "think", *CALLING],
    "qwen2_5": [*PLAIN, "think", *CALLING],
    "gptoss": [*THINKING, *CALLING, "call with a thought"],
    "llama3": PLAIN,
    "phi3": PLAIN,
    "gemma": ["one turn", "two turns", "code"],
    "gemma3": PLAIN,
    "lfm2_v2": [*PLAIN, *CALLING],
    "cohere": PLAIN,
    "cohere2": PLAIN,
}


def tokenizer_of(name, template=None):
    texts = [(TEMPLATES / f"{each}.jinja").read_text() for each in (name, f"{name}_training")]
    special = tuple(sorted({mark for text in texts for mark in MARKERS.findall(text)}))
    tokenizer = copy.copy(byte_level(special, "<s>", "</s>"))
    tokenizer.chat_template = texts[0] if template is None else texts[1]
    return tokenizer


def squeezed(text: str) -> str:
    return "".join(text.split())


def runs(example, tokenizer) -> list[str]:
    """What every run of supervised tokens says."""
    said: list[list[int]] = []
    before = False
    for token, mark in zip(example.input_ids, example.supervised, strict=True):
        said += [[]] if mark and not before else []
        if mark:
            said[-1].append(token)
        before = mark
    return [squeezed(tokenizer.decode(ids)) for ids in said]


OTHERWISE = {  # where TRL writes less: it drops a thought
    ("deepseek_r1_distill", "reasoning"),
    ("gptoss", "call with a thought"),
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in TAKES.items() for row in rows])
def test_rows_train_as_trl_trains_them(name, row):
    """The text is TRL's, what is trained TRL trains too, and of the answers nothing is left out."""
    tokenizer, content = tokenizer_of(name), ROWS[row]
    examples = load_examples([copy.deepcopy(content)], tokenizer, max_length=4096)
    check_supervision(examples, tokenizer)
    assert examples.report.masked_turns == 0
    trained = [run for example in examples for run in runs(example, tokenizer)]
    answers = [message for message in content["messages"] if message["role"] == "assistant"]
    assert len(trained) == len(answers)
    for message, run in zip(answers, trained, strict=True):
        assert squeezed(message.get("content", "").removeprefix("<think>")) in run
        assert squeezed(message.get("reasoning_content", "")) in run
    if len(examples) > 1 or (name, row) in OTHERWISE:  # a turn that TRL's template rewrites is trained as it was said
        return
    theirs = tokenizer_of(name, "training").apply_chat_template(
        content["messages"], tools=content.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    both = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    marked = squeezed(tokenizer.decode([token for token, mark in both if mark]))
    assert tokenizer.decode(examples[0].input_ids) == tokenizer.decode(theirs["input_ids"])
    assert all(run in marked for run in trained)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
@pytest.mark.parametrize("row", [*PLAIN, *CALLING])
def test_llamas_with_a_date(name, row):
    tokenizer = copy.copy(byte_level(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<s>", "</s>"))
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    examples = load_examples([copy.deepcopy(ROWS[row])], tokenizer, max_length=4096)
    check_supervision(examples, tokenizer)
    text = tokenizer.apply_chat_template(ROWS[row]["messages"], tools=ROWS[row].get("tools"), tokenize=False)
    assert tokenizer.decode(examples[0].input_ids) == text


@pytest.mark.parametrize("name", ["gemma4_v5", "diffusion_gemma"])
def test_the_one_turn_that_cannot_be_aligned_is_left_out_and_counted(name):
    tokenizer = byte_level(
        tuple(sorted(set(MARKERS.findall((TEMPLATES / f"{name}.jinja").read_text())))), "<s>", "</s>"
    )
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    said = answer("Let me look.", tool_calls=[call({"city": "Paris"})])
    row = {"messages": [user("Weather?"), said, RESULT, answer("It is sunny.")], "tools": TOOLS}
    examples = load_examples([row], tokenizer, max_length=4096)
    check_supervision(examples, tokenizer)
    trained = "".join(tokenizer.decode(ids[mask]) for ids, mask in map(examples.arrays, range(len(examples))))
    assert "get_weather" in trained
    assert "It is sunny." not in trained
    assert examples.report.masked_turns == 1


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_5_nothink", "qwen3_8"])
def test_a_greeting_that_a_template_does_not_write_by_itself_is_left_out_and_counted(name):
    tokenizer = tokenizer_of(name)
    row = {"messages": [answer("Welcome!"), user("Hi"), answer("Hello.")]}
    examples = load_examples([row], tokenizer, max_length=4096)
    trained = "".join(tokenizer.decode(ids[mask]) for ids, mask in map(examples.arrays, range(len(examples))))
    assert "Hello.<|im_end|>" in trained
    assert "Welcome!" not in trained
    assert examples.report.masked_turns == 1
    with pytest.raises(InputError, match="the chat template refuses the conversation: No user query"):
        load_examples([{"messages": [answer("Welcome!")]}], tokenizer, max_length=4096)


def test_the_marks_that_end_glms_turns_are_those_of_the_next_speaker():
    tokenizer = tokenizer_of("glm4moe")
    (example,) = load_examples([copy.deepcopy(ROWS["call and answer"])], tokenizer, max_length=4096)
    trained = tokenizer.decode(
        [token for token, mark in zip(example.input_ids, example.supervised, strict=True) if mark]
    )
    assert trained.index("<|observation|>") < trained.index("It is sunny.<|user|>")


def test_reasoning_that_a_family_does_not_know_is_refused():
    with pytest.raises(InputError, match="leaves out part of message 2"):
        load_examples([copy.deepcopy(ROWS["reasoning"])], tokenizer_of("qwen2_5"), max_length=4096)


def test_arguments_as_text_for_templates_that_put_them_together_as_text():
    """With the spacing that the row has, where it gives text."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + ' ' + c['function']['arguments'] }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = copy.copy(byte_level(("<|im_start|>",), None, "<|im_end|>"))
    tokenizer.chat_template = template
    for given, written in (({"city": "Köln"}, '{"city": "Köln"}'), ('{"city":"Paris"}', '{"city":"Paris"}')):
        row = {"messages": [user("Weather?"), answer(tool_calls=[call(given)])]}
        (example,) = load_examples([row], tokenizer, max_length=1000)
        trained = [token for token, mark in zip(example.input_ids, example.supervised, strict=True) if mark]
        assert tokenizer.decode(trained) == f"<call>get_weather {written}<|im_end|>"


def test_under_all_a_conversation_ends_with_the_mark_too():
    tokenizer = tokenizer_of("glm4moe")
    examples = load_examples([copy.deepcopy(ROWS["one turn"])], tokenizer, max_length=4096, train_on="all")
    check_supervision(examples, tokenizer)
    assert tokenizer.decode(examples[0].input_ids).endswith("Hello 日本 😀.<|user|>")


KIMI = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_system|>tool<|im_middle|>## Return of {{ m.tool_call_id }}: {{ m.content }}"
    "{% else %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}"
    "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments | tojson }}<|tool_call_end|>"
    "{% endfor %}<|tool_calls_section_end|>{% endif %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)


@pytest.mark.parametrize("given", ["call_8f2c", None, "functions.get_weather:0"])
def test_kimi_names_a_function_by_the_id_of_its_call(given):
    tokenizer = copy.copy(byte_level(tuple(sorted(set(MARKERS.findall(KIMI)))), None, "[EOS]"))
    tokenizer.chat_template = KIMI
    identified = {key: value for key, value in call({"city": "Paris"}).items() if key != "id"}
    result = {"role": "tool", "content": "sunny"}
    if given is not None:
        identified, result = {**identified, "id": given}, {**result, "tool_call_id": given}
    messages = [user("Weather?"), answer(tool_calls=[identified]), result, answer("It is sunny.")]
    (example,) = load_examples([{"messages": messages, "tools": TOOLS}], tokenizer, max_length=1000)
    text = tokenizer.decode(example.input_ids)
    assert '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}' in text
    assert "## Return of functions.get_weather:0: sunny" in text
