"""A conversation as it is typed: commands, several lines, Ctrl-C; and answers whose tokens are drawn."""

from __future__ import annotations

import builtins
import json
import math
import signal

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from lowrank.cli.app import app
from lowrank.errors import InputError
from lowrank.recipes import chat as recipe
from lowrank.recipes.chat import chat, open_model
from lowrank.recipes.parts.sampling import Sampling


@pytest.fixture
def base(tmp_path):
    """A tiny model's folder."""
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def typed(monkeypatch):
    """typed(lines): what `input` gives, one after the other; an exception is raised."""

    def type_in(*lines):
        waiting = iter(lines)

        def read(prompt=""):
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return type_in


@pytest.fixture
def heard(monkeypatch):
    """Every history that was answered, as (role, content)."""
    found, answer = [], recipe.answer

    def listening(model, tokenizer, messages, *rest, **more):
        found.append([(m["role"], m["content"]) for m in messages])
        return answer(model, tokenizer, messages, *rest, **more)

    monkeypatch.setattr(recipe, "answer", listening)
    return found


def users(history):
    return [text for role, text in history if role == "user"]


class TestCommands:
    def test_system_and_reset(self, base, typed, heard):
        typed("one", "/system Be brief.", "two", "/reset", "three", "/system", "four", "")
        chat(base, system="S", max_new_tokens=2)
        assert [users(history) for history in heard] == [["one"], ["one", "two"], ["three"], ["three", "four"]]
        systems = [[text for role, text in history if role == "system"] for history in heard]
        assert systems == [["S"], ["Be brief."], ["Be brief."], []]

    def test_what_is_saved_can_be_read_as_rows(self, base, typed, heard, tmp_path, capsys):
        typed("/save x.jsonl", "one", f"/save {tmp_path / 'said.jsonl'}", "two", f"/save {tmp_path / 'said.jsonl'}", "")
        chat(base, system="S", max_new_tokens=2)
        assert "nothing has been said yet" in capsys.readouterr().out
        first, second = [json.loads(line)["messages"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        assert [m["role"] for m in first] == ["system", "user", "assistant"]
        assert second[:3] == first
        assert second[3] == {"role": "user", "content": "two"}
        assert heard[1] == [(m["role"], m["content"]) for m in second[:4]]

    def test_a_file_that_cannot_be_written_and_an_unknown_command_end_nothing(
        self, base, typed, heard, tmp_path, capsys
    ):
        typed("one", f"/save {tmp_path / 'no' / 'x'}", "/sytem", "/save", "//etc", "/help", "")
        chat(base, max_new_tokens=2)
        assert [users(history) for history in heard] == [["one"], ["one", "/etc"]]
        said = capsys.readouterr().out
        for told in ("cannot be written", "no command /sytem", "/save needs a file's name", "/reset"):
            assert told in said

    def test_lines_between_quotes_are_one_message(self, base, typed, heard):
        typed('"""', "one", "", '  two"""', '"""three', '"""', '"""four"""', "")
        chat(base, max_new_tokens=2)
        assert users(heard[-1]) == ["one\n\n  two", "three", "four"]

    def test_what_cannot_be_asked_is_told_and_forgotten(self, base, typed, heard, capsys):
        tiny_gpt2(n_positions=120, n_layer=1).save_pretrained(base)
        typed("one", "x" * 120, "two", "")
        chat(base, max_new_tokens=2)
        assert "positions" in capsys.readouterr().out
        assert users(heard[-1]) == ["one", "two"]


class TestInterrupt:
    def test_ends_an_answer_that_is_remembered_as_far_as_it_came(self, base, typed, heard, monkeypatch):
        full = chat(base, prompts=["one"], max_new_tokens=40)[0]
        put = recipe.TextStreamer.put

        def pressed(self, value):
            put(self, value)
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 4 and len(heard) == 2:  # the prompt, and three tokens of the conversation's first answer
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(recipe.TextStreamer, "put", pressed)
        before = signal.getsignal(signal.SIGINT)
        typed("one", "two", "")
        chat(base, max_new_tokens=40)
        (role, said), last = heard[2][1:]
        assert (role, last) == ("assistant", ("user", "two"))
        assert said != full
        assert full.startswith(said)
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_second_one_takes_the_question_back(self, base, typed, heard, monkeypatch):
        put = recipe.TextStreamer.put

        def pressed(self, value):
            put(self, value)
            if len(heard) == 1:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(recipe.TextStreamer, "put", pressed)
        typed("one", "two", "")
        chat(base, max_new_tokens=9)
        assert users(heard[1]) == ["two"]

    def test_at_the_prompt_ends_the_conversation(self, base, typed, heard):
        typed("one", KeyboardInterrupt(), "two")
        assert chat(base, max_new_tokens=2) == []
        assert len(heard) == 1


class TestDrawing:
    OPTIONS = ({"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 2.0, "top_p": 0.9, "top_k": 50})

    @pytest.mark.parametrize("options", OPTIONS)
    def test_is_what_generate_draws(self, base, options):
        model, tokenizer = open_model(base)
        wanted = []
        for text in ("Who?", "a"):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
            )["input_ids"]
            torch.manual_seed(5)
            ends = [model.config.eos_token_id, tokenizer.eos_token_id]
            how = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
            output = model.generate(ids, max_new_tokens=8, do_sample=True, eos_token_id=ends, pad_token_id=0, **how)
            wanted.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        sampling = Sampling(**options, seed=5)
        state = torch.get_rng_state()
        assert chat(base, prompts=["Who?", "a"], max_new_tokens=8, sampling=sampling) == wanted
        assert chat(base, prompts=["a"], max_new_tokens=8, sampling=sampling) == wanted[1:]
        assert torch.equal(torch.get_rng_state(), state)
        assert chat(base, prompts=["Who?", "a"], max_new_tokens=8) != wanted

    def test_differs_from_time_to_time_without_a_seed(self, base):
        said = {chat(base, prompts=["a"], max_new_tokens=8, sampling=Sampling(1.0))[0] for _ in range(4)}
        assert len(said) > 1

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": -1.0},
            {"temperature": math.nan},
            {"temperature": 1e-9},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"top_k": 0},
            {"temperature": 1.0, "seed": -1},
            {"seed": 3},
            {"temperature": 0.0, "top_p": 0.5},
        ],
    )
    def test_values_that_mean_nothing_are_refused(self, options):
        with pytest.raises(InputError):
            Sampling(**options)

    def test_from_the_command_line(self, base):
        asked = ["chat", base, "--prompt", "a", "--max-new-tokens", "8"]
        wanted = chat(base, prompts=["a"], max_new_tokens=8, sampling=Sampling(0.9, 0.8, 7, 3))[0]
        options = ["--temperature", "0.9", "--top-p", "0.8", "--top-k", "7", "--seed", "3"]
        drawn, zero = CliRunner().invoke(app, asked + options), CliRunner().invoke(app, [*asked, "--temperature", "0"])
        assert wanted in drawn.output
        assert chat(base, prompts=["a"], max_new_tokens=8)[0] in zero.output
