"""What was learned is what answers: where answers end, and how the model is asked, in every verb and every folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tiny import CHATML, tiny_llama, tiny_tokenizer
from tokenizers import AddedToken

import lowrank
from lowrank.data import TEMPLATES, load_examples, use_template
from lowrank.data.supervision.choose_template import complete_template
from lowrank.errors import InputError
from lowrank.recipes.chat import chat, open_model
from lowrank.recipes.compose import compose_adapters, resize_adapter
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.export import export_adapter
from lowrank.recipes.extract import extract_adapter
from lowrank.recipes.merge import merge_adapter
from lowrank.weights.files.notes import stop_at

HEADLESS = CHATML.partition("{% if add_generation_prompt")[0]


def base_without_template(folder: Path, eos: str | None = "</s>") -> Path:
    """A base as it comes from pretraining: it ends a text with `</s>`, and knows ChatML's marks as special tokens."""
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.eos_token = eos
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t) for t in ("<|im_start|>", "<|im_end|>")]})
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains on yes and no until that is known, and gives (config, what the run gave)."""
    monkeypatch.chdir(tmp_path)

    def trained(base: Path, template: str | None = "chatml", **sections):
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ASKED]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "model": {"name_or_path": str(base)},
            "adapter": {"r": 16, "lora_alpha": 32},
            "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 64, "chat_template": template},
            "training": {
                "output_dir": "out",
                "learning_rate": 5e-3,
                "max_steps": STEPS,
                "save_steps": STEPS,
                "predict_with_generate": True,
                "eval_on_start": False,
                "generation_max_new_tokens": 12,
                "report_to": "none",
            },
        }
        for section, values in sections.items():
            config[section] = {**({} if "method" in values else config[section]), **values}
        Path("run.yaml").write_text(yaml.safe_dump(config))
        return Path("run.yaml"), lowrank.train("run.yaml")

    return trained


STEPS = 80
ASKED = [("one", "yes"), ("two", "no")]
END = "<|im_end|>"


def ends_in(folder) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = json.loads((Path(folder) / "generation_config.json").read_text())
    return tokenizer.convert_ids_to_tokens(config["eos_token_id"])


def test_the_end_of_a_trained_turn_ends_an_answer_everywhere(run, tmp_path):
    base = base_without_template(tmp_path / "base")
    path, result = run(base)
    assert result.after.exact_match == 1.0
    assert [sample.answer for sample in result.after.samples] == ["yes", "no"]
    again = evaluate(path, adapter="out")
    assert again.exact_match == 1.0
    assert (
        evaluate(path, adapter=f"out/checkpoints/step-{STEPS}", overrides=["data.chat_template=null"]).exact_match
        == 1.0
    )
    assert chat("out", prompts=["one", "two"], max_new_tokens=12) == ["yes", "no"]
    assert chat("out", prompts=["two"], max_new_tokens=12) == ["no"]
    merge_adapter("out", "merged", verify=False)
    export_adapter("out", "exported", to="vllm")
    export_adapter("out", "mlx", to="mlx")
    export_adapter("out", "peft", to="peft")
    export_adapter("out", "gguf", to="llama.cpp")
    resize_adapter("out", "smaller", rank=2)
    compose_adapters(["out", "smaller"], "composed", weights=[1.0, 0.0])
    extract_adapter(base, "merged", "extracted", r=16)
    written = ("merged", "exported", "mlx", "peft", "gguf", "smaller", "composed", "extracted")
    for folder in ("out", f"out/checkpoints/step-{STEPS}", *written):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert ends_in(folder) == [END, "</s>"], folder
        assert tokenizer.eos_token == "</s>", folder
        assert "<|im_start|>" in tokenizer.chat_template, folder
    for folder in ("merged", "composed", "extracted"):
        assert chat(folder, prompts=["one", "two"], max_new_tokens=12) == ["yes", "no"], folder
    _served_alone("merged")


def _served_alone(folder: str) -> None:
    """As transformers by itself answers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question, _ in ASKED]
    for messages, (_, answer) in zip(chats, ASKED, strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(said) == answer + END


def test_the_plan_names_the_ends(run, tmp_path, capsys):
    run(base_without_template(tmp_path / "base"), training={"max_steps": 1, "predict_with_generate": False})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "answers end at" in line]
    assert f"{END}, </s>" in line


def test_a_tokenizer_without_an_end_token_gets_the_trained_one(run, tmp_path):
    base = base_without_template(tmp_path / "base", eos=None)
    _, result = run(base, training={"max_steps": 1})
    merge_adapter("out", "merged", verify=False)
    for folder in ("out", "merged"):
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == END
    assert result.output_dir.name == "out"


def test_the_whole_model_that_is_trained_says_so_too(run, tmp_path):
    base = base_without_template(tmp_path / "base")
    run(base, adapter={"method": "full"}, training={"max_steps": 1, "learning_rate": 1e-3})
    assert ends_in("out") == [END, "</s>"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi", "mistral", "plain"])
def test_the_packages_templates_over_a_base_with_another_end(name):
    """What ends a turn is found; the base's own end token stays an end beside it."""
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark) for mark in TEMPLATES[name]]})
    use_template(tokenizer, name)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    for train_on in ("assistant", "all"):
        examples = load_examples([row], tokenizer, max_length=100, train_on=train_on)
        model = tiny_llama(vocab_size=len(tokenizer))
        ends = stop_at(model, tokenizer, lowrank.data.end_tokens(examples, tokenizer))
        mark = TEMPLATES[name][-1] if name in ("chatml", "llama3", "gemma", "phi") else "</s>"
        assert tokenizer.convert_ids_to_tokens(ends)[0] == mark
        assert "</s>" in tokenizer.convert_ids_to_tokens(ends)


def test_ends_that_are_several_are_all_kept(tmp_path):
    """A model's own, its tokenizer's, and those that were trained, the last first."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = [2, 7]
    assert stop_at(model, tokenizer, [9, 8]) == [9, 8, 2, 7, tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == [9, 8, 2, 7, tokenizer.eos_token_id]


def test_under_all_the_end_of_a_turn_is_found_in_the_template():
    tokenizer = tiny_tokenizer(chat_template=CHATML + "{% if not add_generation_prompt %}</s>{% endif %}")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t) for t in ("<|im_start|>", "</s>")]})
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    found = {}
    for train_on in ("all", "assistant"):
        examples = load_examples([row], tokenizer, max_length=100, train_on=train_on)
        found[train_on] = tokenizer.convert_ids_to_tokens(lowrank.data.end_tokens(examples, tokenizer))
    assert found["assistant"] == [END]
    assert found["all"] == [END, "</s>"]


class TestTemplates:
    def test_a_template_without_a_generation_prompt_gets_one_and_the_plan_says_so(self, run, tmp_path, capsys):
        base = base_without_template(tmp_path / "base")
        Path("headless.jinja").write_text(HEADLESS)
        _, result = run(base, template="headless.jinja")
        assert "generation prompt" in capsys.readouterr().out
        assert result.after.exact_match == 1.0
        assert chat("out", prompts=["one", "two"], max_new_tokens=12) == ["yes", "no"]
        merge_adapter("out", "merged", verify=False)
        _served_alone("merged")

    def test_conversations_are_written_as_before(self):
        tokenizer = tiny_tokenizer(chat_template=HEADLESS)
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
        before = tokenizer.apply_chat_template(messages, tokenize=False)
        assert complete_template(tokenizer) == "<|im_start|>assistant\n"
        assert tokenizer.apply_chat_template(messages, tokenize=False) == before
        assert complete_template(tokenizer) == ""
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def test_a_base_is_asked_with_the_prompt_that_its_template_leaves_out(self, tmp_path, monkeypatch):
        tokenizer = tiny_tokenizer(chat_template=HEADLESS)
        tiny_llama().save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        model, tokenizer = open_model(str(tmp_path / "base"))
        asked = []
        generate = type(model).generate
        monkeypatch.setattr(type(model), "generate", lambda *a, **k: asked.append(k["input_ids"]) or generate(*a, **k))
        chat(str(tmp_path / "base"), prompts=["Hi"], max_new_tokens=2)
        assert tokenizer.decode(asked[0][0]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("prompt", ["", " "])
def test_rows_with_empty_prompts_are_answered(run, tmp_path, prompt):
    base = base_without_template(tmp_path / "base")
    Path("plain.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "hello"}) + "\n")
    data = {"train": "plain.jsonl", "eval": "plain.jsonl", "chat_template": None}
    _, result = run(base, data=data)
    assert result.after.exact_match == 1.0
    assert torch.isfinite(torch.tensor(result.after.loss))


def test_a_base_with_nan_in_it_is_told_as_that_when_it_is_asked(tmp_path):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"1 of the weights of .* hold NaN or infinity: model\.layers\.0"):
        chat(str(tmp_path), prompts=["Hi"], max_new_tokens=2)


def test_a_model_with_an_adapter_ends_its_answers_where_the_adapter_says(run, tmp_path):
    run(base_without_template(tmp_path / "base"))
    model = lowrank.load(transformers.AutoModelForCausalLM.from_pretrained("base"), "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 2]
