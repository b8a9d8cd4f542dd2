"""`lowrank chat --compare`: each answers as it does alone."""

from __future__ import annotations

import builtins
import io
import json

import pytest
import torch
from architectures import MODELS
from rich.console import Console
from tiny import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

import lowrank
from lowrank.cli.app import app
from lowrank.errors import InputError
from lowrank.recipes import chat as recipe
from lowrank.recipes import compare as compare_recipe
from lowrank.recipes.chat import chat
from lowrank.recipes.compare import compare, show
from lowrank.recipes.parts.sampling import Sampling
from lowrank.weights.files.notes import SYSTEM

PROMPTS = ["Who?", "What is it?", "a"]


def adapter_of(base, folder, seed: int, **options):
    """An adapter's folder whose answers differ from the base's."""
    torch.manual_seed(seed)
    model = lowrank.wrap(recipe.open_model(str(base))[0], lowrank.LoraConfig(r=4, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    lowrank.save(model, folder)
    return str(folder)


@pytest.fixture
def places(tmp_path):
    """(the base's folder, two adapters' folders)"""
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    one = adapter_of(tmp_path / "base", tmp_path / "one", 1)
    return str(tmp_path / "base"), one, adapter_of(tmp_path / "base", tmp_path / "two", 2, use_dora=True)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=4)])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_base_and_adapter_answer_as_each_alone(places, prompts, sampling):
    _, one, _ = places
    options = {"prompts": prompts, "max_new_tokens": 8, "sampling": sampling}
    found = compare([one], **options)
    assert found == {"base": chat(one, use_adapter=False, **options), "one": chat(one, **options)}
    assert found["base"] != found["one"]


def test_adapters_answer_as_each_alone_with_what_is_theirs(places, tmp_path):
    """Template, end tokens and system message are each adapter's own."""
    _, one, two = places
    template = tiny_tokenizer().chat_template
    other = template.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n!{% endif")
    assert other != template
    tiny_tokenizer(chat_template=other).save_pretrained(two)
    plain = compare([one, two], prompts=PROMPTS, max_new_tokens=12)
    said = next(character for character in plain["one"][0][1:] if character.isascii())
    end = tiny_tokenizer()(said, add_special_tokens=False)["input_ids"][0]
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    (tmp_path / "two" / SYSTEM).write_text("Be brief.")
    found = compare([one, two], prompts=PROMPTS, max_new_tokens=12)
    assert found == {path.split("/")[-1]: chat(path, prompts=PROMPTS, max_new_tokens=12) for path in (one, two)}
    assert found["one"][0] != plain["one"][0]
    assert found["two"] != plain["two"]
    assert compare([two, one], prompts=PROMPTS, max_new_tokens=12) == found


def test_in_a_conversation_each_remembers_its_own_answers(places, monkeypatch, tmp_path, capsys):
    _, one, two = places

    def type_in(*lines):
        waiting = iter(lines)
        monkeypatch.setattr(builtins, "input", lambda prompt="": next(waiting))

    saved = {}
    for name, path in (("one", one), ("two", two)):
        type_in("a", "/system S", "b", f"/save {tmp_path / name}.jsonl", "")
        chat(path, max_new_tokens=6)
        saved[name] = json.loads((tmp_path / f"{name}.jsonl").read_text())["messages"]
    type_in("a", "/system S", "b", f"/save {tmp_path / 'both.jsonl'}", "")
    capsys.readouterr()
    compare([one, two], max_new_tokens=6)
    rows = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert {row["answered_by"]: row["messages"] for row in rows} == saved
    assert saved["one"] != saved["two"]
    said = capsys.readouterr().out
    for name, messages in saved.items():
        for message in messages:
            if message["role"] == "assistant":
                assert f"[{name}]\n{message['content']}\n" in said


def test_on_a_terminal_answers_stand_in_columns():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    show(console, ["base", "[b]one"], ["left :smile:", "right [red]x[/red]"])
    lines = console.file.getvalue().splitlines()
    assert any("base" in line and "[b]one" in line for line in lines)
    assert any("left :smile:" in line and "right [red]x[/red]" in line for line in lines)


class TestTogether:
    """Greedy answers come in one pass over the base, where that is exact."""

    @pytest.fixture
    def alone(self, monkeypatch):
        """How many conversations were asked alone."""
        counts = []
        for name in ("answer", "found_answers"):
            whole = getattr(compare_recipe, name)

            def counted(model, tokenizer, asked, *more, whole=whole, name=name, **options):
                counts.append(1 if name == "answer" else len(asked))
                return whole(model, tokenizer, asked, *more, **options)

            monkeypatch.setattr(compare_recipe, name, counted)
        return counts

    @pytest.mark.parametrize("prompts", [PROMPTS, [f"{'long ' * i}?" for i in range(12)]], ids=["few", "many"])
    def test_several_adapters_and_a_base(self, places, alone, prompts, capsys):
        _, one, two = places
        options = {"prompts": prompts, "max_new_tokens": 10}
        both, beside = compare([one, two], **options), compare([two], **options)
        assert alone == []
        assert "asked alone" not in capsys.readouterr().err
        assert both == {"one": chat(one, **options), "two": chat(two, **options)}
        assert beside == {"base": chat(two, use_adapter=False, **options), "two": chat(two, **options)}

    def test_a_near_tie_is_asked_again_alone(self, places, alone):
        base, one, two = places
        model = tiny_llama(initializer_range=0.2)
        with torch.no_grad():
            model.lm_head.weight[1::2] = model.lm_head.weight[::2]  # every token has a twin
        model.save_pretrained(base)
        options = {"prompts": PROMPTS, "max_new_tokens": 10}
        assert compare([one, two], **options) == {"one": chat(one, **options), "two": chat(two, **options)}
        assert alone == [3, 3]

    def test_a_short_dtype_and_experts_are_told(self, places, alone, capsys, tmp_path):
        base, one, two = places
        options = {"prompts": PROMPTS, "max_new_tokens": 4}
        tiny_llama(initializer_range=0.2).to(torch.bfloat16).save_pretrained(base)
        found = compare([one, two], **options)
        assert "each is asked alone: in bfloat16 a batch rounds too differently from one row" in capsys.readouterr().err
        assert found == {"one": chat(one, **options), "two": chat(two, **options)}
        assert alone == [3, 3]
        MODELS["qwen3_moe"]().save_pretrained(tmp_path / "experts")
        tiny_tokenizer().save_pretrained(tmp_path / "experts")
        stacks = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
        adapter = adapter_of(tmp_path / "experts", tmp_path / "three", 3, **stacks)
        capsys.readouterr()
        compare([adapter], prompts=["a"], max_new_tokens=2)
        assert (
            "each is asked alone: the adapter three cannot be routed: it adapts model.layers.0.mlp.experts"
            in capsys.readouterr().err
        )


class TestRefused:
    def test_another_base(self, places, tmp_path):
        _, one, _ = places
        tiny_llama(initializer_range=0.1).save_pretrained(tmp_path / "elsewhere")
        tiny_tokenizer().save_pretrained(tmp_path / "elsewhere")
        other = adapter_of(tmp_path / "elsewhere", tmp_path / "other", 3)
        with pytest.raises(InputError, match="another base"):
            compare([one, other], prompts=["a"])

    def test_what_is_no_adapter_or_given_twice(self, places):
        base, one, _ = places
        with pytest.raises(InputError, match="no adapter's folder"):
            compare([base], prompts=["a"])
        with pytest.raises(InputError, match="given twice"):
            compare([one, f"{one}/."], prompts=["a"])


def test_names_that_are_alike_are_told_apart(places, tmp_path):
    base, one, _ = places
    (tmp_path / "x").mkdir()
    again, named = adapter_of(base, tmp_path / "x" / "one", 5), adapter_of(base, tmp_path / "x" / "base", 6)
    assert set(compare([one, again], prompts=["a"], max_new_tokens=2)) == {one, again}
    assert set(compare([named], prompts=["a"], max_new_tokens=2)) == {"base", named}


def test_from_the_command_line(places):
    _, one, two = places
    asked = ["--prompt", "Who?", "--prompt", "a", "--max-new-tokens", "6"]
    wanted = compare([one, two], prompts=["Who?", "a"], max_new_tokens=6)
    said = CliRunner().invoke(app, ["chat", one, two, "--compare", *asked])
    assert said.exit_code == 0
    for name, texts in wanted.items():
        for text in texts:
            assert f"[{name}]\n{text}\n" in said.output
    for wrong in ([one, two], [one, "--compare", "--no-adapter"]):
        assert isinstance(CliRunner().invoke(app, ["chat", *wrong, *asked]).exception, InputError)
