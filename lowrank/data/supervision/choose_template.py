"""Chat templates that come with the package, for tokenizers that have none."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.template import ChatTemplate, special_tokens
from lowrank.errors import InputError

# What a tokenizer must know as special tokens for a template to make sense: its markers, and the end of a turn.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi": ("<|user|>", "<|assistant|>", "<|end|>"),
    "mistral": ("[INST]", "[/INST]"),
    "plain": (),
}


_PROMPT = "{{%- if add_generation_prompt %}}{{{{- {} }}}}{{%- endif %}}"
_QUESTION = {"role": "user", "content": "Hi"}


def fitting_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The templates of the package whose special tokens a tokenizer has; `plain` fits every one with an eos token."""
    known = special_tokens(tokenizer)
    fitting = [name for name, needed in TEMPLATES.items() if all(token in known for token in needed)]
    return [name for name in fitting if tokenizer.eos_token is not None or name != "plain"]


def use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer a chat template, in place; it is saved with the tokenizer.

    Args:
        tokenizer: The tokenizer.
        template: A name from `TEMPLATES`, the path of a .jinja file, or the template itself.

    Raises:
        InputError: there is no such template, or the tokenizer lacks its special tokens.
    """
    if template in TEMPLATES:
        if template not in fitting_templates(tokenizer):
            lacking = [token for token in TEMPLATES[template] if token not in special_tokens(tokenizer)]
            raise InputError(
                f"the tokenizer does not have the special tokens of the template {template!r}: {', '.join(lacking)}",
                where="data.chat_template",
                fix=f"Templates that fit: {', '.join(fitting_templates(tokenizer))}.",
            )
        tokenizer.chat_template = (files("lowrank.data.supervision") / "templates" / f"{template}.jinja").read_text()
    elif "{%" in template or "{{" in template:
        tokenizer.chat_template = template
    elif Path(template).is_file():
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{template} is not UTF-8 text", where="data.chat_template") from None
    else:
        raise InputError(
            f"there is no chat template {template!r}",
            where="data.chat_template",
            fix=f"Give one of {', '.join(TEMPLATES)}, a .jinja file, or the template itself.",
        )


def complete_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Makes a chat template write the generation prompt that it leaves out, in place: servers add none by themselves.

    Returns:
        What it writes now and did not before; empty where nothing is missing, or it cannot be made to.
    """
    if not isinstance(tokenizer.chat_template, str):
        return ""
    was, header = tokenizer.chat_template, missing_prompt(tokenizer)
    if not header:
        return ""
    before = _rendered(tokenizer)
    tokenizer.chat_template = was + _PROMPT.format(json.dumps(header, ensure_ascii=False))
    if _rendered(tokenizer) != before or missing_prompt(tokenizer):
        tokenizer.chat_template = was
        return ""
    return header


def added_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What `complete_template` has made a chat template write; empty where that was nothing."""
    before, _, behind = _PROMPT.format("\0").partition("\0")
    _, found, tail = str(tokenizer.chat_template).rpartition(before)
    return json.loads(tail.removesuffix(behind)) if found and tail.endswith(behind) and tail[:1] == '"' else ""


def missing_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before an answer and a chat template does not write when it is asked for one; mostly nothing."""
    if tokenizer.chat_template is None:
        return ""
    try:
        return ChatTemplate(tokenizer).missing_header([_QUESTION], None)
    except RowError:
        return ""


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A prompt, and conversations that no prompt ends, as the template writes them."""
    template, answer = ChatTemplate(tokenizer), {"role": "assistant", "content": "Yes"}
    ended = template.render([[_QUESTION], [_QUESTION, answer], [_QUESTION, answer, _QUESTION]], None)
    return template.prompts([[_QUESTION], [_QUESTION, answer, _QUESTION]], None) + ended
