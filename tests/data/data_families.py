"""Real template families with small tokenizers of the same make: byte-level BPE, or byte-fallback BPE on `▁`.

The templates are written out from how each family lays its conversations out, tools and rewritings included. The
tokenizers are trained on a few lines here, so that words are split and merged as in the real ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello there, how are you today? I am fine, thanks. The weather in Paris is sunny and 21 degrees.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    'assistant user system {"name": "get_weather", "arguments": {"city": "Paris"}}',
    "  spaces   here\n\n\nand lines\tand tabs. été naïve 日本語 のテスト Привет мир",
] * 20


GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def byte_level(
    special: tuple[str, ...], bos: str | None, eos: str, trim_offsets: bool = True, words: str = LLAMA_WORDS
) -> PreTrainedTokenizerFast:
    """As Qwen, Llama 3 and SmolLM have it; `trim_offsets` leaves white space out of the offsets it reports."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    if bos is None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if bos is not None:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=trim_offsets), template]
        )
    return tokenizer


@cache
def sentence_piece(
    special: tuple[str, ...], bos: str, eos: str, prepend: bool, strip_right: bool = False
) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Phi-3 (`prepend`: a space before every stretch of text) or Gemma (none) have it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", bos, eos, *in_bytes], limit_alphabet=60, show_progress=False
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_without_special_bytes(backend), bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token=eos
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, rstrip=strip_right, special=True) for token in special]}
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    return tokenizer


def _without_special_bytes(backend: Tokenizer) -> Tokenizer:
    """The same model with the byte tokens as ordinary entries of its vocabulary."""
    told = json.loads(backend.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(told))


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

# The system message goes into the last question, and only while that has not been answered.
MISTRAL_NEMO = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Closes the conversation with the end-of-text token behind the last turn's own end.
PHI = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You are a helpful assistant.' }}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions.\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set is_plain_answer = message.role == 'assistant' and not message.tool_calls %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or is_plain_answer %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()

# Reasoning stands in the turns after the last question and is taken out of those before it, as Qwen 3 does.
QWEN_THINKING = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\\n<think>\\n' + (message.reasoning_content or '').strip('\\n') }}
        {{- '\\n</think>\\n\\n' }}
        {{- message.content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()


@dataclass(frozen=True)
class Family:
    """A template, a tokenizer of its make, the end token of an assistant's turn, and how a template writes a text."""

    name: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    template: str
    end: str
    written: Callable[[str], str] = lambda text: text
    system: bool = True
    exact_decoding: bool = True  # False: decoding loses or adds the space before a word

    def make(self) -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(self.tokenizer())
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>",)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
PHI_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

FAMILIES = [
    Family("chatml", lambda: byte_level(IM, None, "<|im_end|>", words=GPT2_WORDS), CHATML, "<|im_end|>"),
    Family("qwen", lambda: byte_level(IM, None, "<|im_end|>", False), QWEN, "<|im_end|>"),
    Family("llama3", lambda: byte_level(HEADERS, "<|begin_of_text|>", "<|eot_id|>"), LLAMA3, "<|eot_id|>", str.strip),
    Family(
        "mistral",
        lambda: sentence_piece(("[INST]", "[/INST]"), "<s>", "</s>", True),
        MISTRAL,
        "</s>",
        lambda text: f" {text}",
        system=False,
        exact_decoding=False,
    ),
    Family("mistral-bytes", lambda: byte_level(("[INST]", "[/INST]"), "<s>", "</s>"), MISTRAL_NEMO, "</s>"),
    Family(
        "gemma",
        lambda: sentence_piece(("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", False),
        GEMMA,
        "<end_of_turn>",
        str.strip,
        system=False,
    ),
    Family(
        "phi",
        lambda: sentence_piece(PHI_MARKS, "<s>", "<|endoftext|>", True, True),
        PHI,
        "<|end|>",
        exact_decoding=False,
    ),
    Family("phi-bytes", lambda: byte_level(PHI_MARKS, None, "<|endoftext|>"), PHI, "<|end|>"),
]
