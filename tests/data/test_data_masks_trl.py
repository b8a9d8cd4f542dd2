"""The loss mask against TRL's: its training templates mark what the assistant says, transformers reads the marks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from data_families import TOOLS, byte_level

from lowrank.data import load_examples

found = importlib.util.find_spec("trl")
TEMPLATES = Path(found.submodule_search_locations[0]) / "chat_templates" if found else Path("none")

# Templates whose marks begin where their generation prompt ends. (Others mark part of the header that the model is
# given, or, as Phi-3's, also the token that closes the whole conversation.)
AGREEING = ["cohere", "cohere2", "gemma", "gemma3", "glm4moe", "lfm2", "llama3", "qwen2_5", "qwen3", "qwen3_vl"]

MARKERS = re.compile(r"<\|[a-zA-Z_0-9]+\|>|<[a-z]+_of_[a-z]+>")

CHATS = {
    "one turn": [("user", "Hi é"), ("assistant", "Hello 日本 😀.")],
    "two turns": [("user", "Hi"), ("assistant", "Hello."), ("user", "More"), ("assistant", "Fine,\n\nthanks")],
    "system": [("system", "Be nice."), ("user", "Hi"), ("assistant", "Hello.")],
}


def make(name: str):
    template = (TEMPLATES / f"{name}_training.jinja").read_text()
    special = tuple(sorted(set(MARKERS.findall(template))))
    tokenizer = byte_level(special, "<s>", "</s>")
    tokenizer.chat_template = template
    return tokenizer


def differences(name: str, row: dict, **template_arguments) -> list[str]:
    """Tokens that one masks and the other does not, but for white space behind an end token, which TRL trains too."""
    tokenizer = make(name)
    theirs = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True, **template_arguments
    )
    examples = load_examples([row], tokenizer, max_length=4096)
    assert [example.input_ids for example in examples] == [theirs["input_ids"]]
    marks = zip(theirs["input_ids"], theirs["assistant_masks"], examples[0].supervised, strict=True)
    return [tokenizer.decode([token]) for token, a, b in marks if bool(a) != b and tokenizer.decode([token]).strip()]


@pytest.mark.skipif(not TEMPLATES.exists(), reason="this version of TRL has no chat templates")
@pytest.mark.parametrize("name", AGREEING)
@pytest.mark.parametrize("chat", CHATS)
def test_masks_agree(name, chat):
    if not (TEMPLATES / f"{name}_training.jinja").exists():
        pytest.skip(f"TRL has no {name} template")
    messages = [{"role": role, "content": content} for role, content in CHATS[chat]]
    if name == "gemma" and chat == "system":
        pytest.skip("the template refuses system messages")
    assert differences(name, {"messages": messages}) == []


@pytest.mark.skipif(not TEMPLATES.exists(), reason="this version of TRL has no chat templates")
def test_masks_of_tool_calls_agree():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    assert differences("qwen2_5", {"messages": messages, "tools": TOOLS}, tools=TOOLS) == []
