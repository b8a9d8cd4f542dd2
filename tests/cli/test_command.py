"""The command line: exit codes, messages, help, and what each verb hands to its recipe."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import typer

from lowrank.cli import main
from lowrank.cli.app import app
from lowrank.errors import InputError, JobError

VERBS = ["init", "train", "eval", "chat", "merge"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    return int(exited.value.code or 0)


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Makes `lowrank init` end in an error."""
    monkeypatch.chdir(tmp_path)

    def failing(error: BaseException) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("lowrank.recipes.init.init", fail)

    return failing


@pytest.fixture
def called(monkeypatch):
    """Puts something in the place of a recipe, and gives back what it was called with."""

    def called(recipe: str) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []
        monkeypatch.setattr(f"lowrank.recipes.{recipe}", lambda *given, **named: calls.append((given, named)))
        return calls

    return called


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: t}\ntraining: {output_dir: o}\n", encoding="utf-8")
    return path


def test_help_names_every_verb(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(f" {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run(verb, "--help") == 0
    assert f"Example: lowrank {verb}" in " ".join(capsys.readouterr().out.split())


def test_help_answers_at_once():
    """Nothing heavy is loaded on the way."""
    code = (
        "import sys; from lowrank.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy', 'yaml'}.intersection(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "a.yaml", "--nope"],
        ["init", "--goal", "x"],
        ["chat", "m", "--max-new-tokens", "0"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_exits_with_2(arguments, capsys):
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_mistakes_in_a_config_exit_with_2_a_line_each(config, capsys):
    config.write_text("base_model: m\nlora_r: 4\ndata: {train: t}\ntraining: {output_dir: o}\n", encoding="utf-8")
    for verb in ("train", "eval"):
        assert run(verb, str(config), "--set", "training.seed=x") == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines() == [
            f"error: {config}:1: base_model: is model.name_or_path here",
            f"       {config}:2: lora_r: is adapter.r here",
            "       --set training.seed: 'x' is not a whole number",
        ]


def test_a_missing_config(capsys):
    assert run("train", "none.yaml") == 2
    assert (
        capsys.readouterr().err == "error: none.yaml: there is no such file; `lowrank init DATA none.yaml` writes one\n"
    )


def test_a_wrong_input_exits_with_2(failing, capsys):
    failing(InputError("the rows are empty", where="rows.jsonl", fix="Add some."))
    assert run("init", "rows.jsonl", "--model", "m") == 2
    assert capsys.readouterr().err == "error: rows.jsonl: the rows are empty\n       Add some.\n"


def test_a_failed_job_exits_with_1(failing, capsys):
    failing(JobError("the disk is full"))
    assert run("init", "rows.jsonl", "--model", "m") == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_an_unforeseen_error_exits_with_1_and_keeps_its_traceback(failing, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(RuntimeError("no kernel image\nand a long explanation"))
    assert run("init", "rows.jsonl", "--model", "m") == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: RuntimeError: no kernel image"
    [kept] = tmp_path.glob("lowrank-*.txt")
    assert second == f"       lowrank did not expect this; where it comes from is in {kept}"
    assert "and a long explanation" in kept.read_text()
    assert "in fail" in kept.read_text()


@pytest.mark.parametrize("error", [InputError("x"), RuntimeError("x")])
@pytest.mark.parametrize(
    "arguments", [["--debug", "init", "d", "--model", "m"], ["init", "d", "--model", "m", "--debug"]], ids=" ".join
)
def test_debug_shows_where_an_error_comes_from(failing, error, arguments):
    failing(error)
    with pytest.raises(type(error)):
        main(arguments)


@pytest.mark.parametrize("left_over", [{"RANK": "3"}, {"RANK": "x"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": ""}])
def test_a_left_over_rank_silences_nobody(failing, capsys, monkeypatch, left_over):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    failing(InputError("there is no such thing"))
    assert run("init", "rows.jsonl", "--model", "m") == 2
    assert "there is no such thing" in capsys.readouterr().err


def test_an_interruption_exits_with_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert run("init", "rows.jsonl", "--model", "m") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_train_hands_on_the_config_with_its_overrides(called, config):
    calls = called("train.train")
    assert run("train", str(config), "--set", "training.seed=7", "--set", "adapter.r=3") == 0
    [((given,), _)] = calls
    assert (given.training.seed, given.adapter.r, given.model.name_or_path) == (7, 3, "m")


def test_eval_hands_on_config_and_adapter(called, config, tmp_path):
    calls = called("evaluate.evaluate")
    assert run("eval", str(config), "--adapter", str(tmp_path), "--set", "data.eval=e") == 0
    assert run("eval", str(config)) == 0
    assert [(given[0].data.eval, given[1]) for given, _ in calls] == [("e", tmp_path), (None, None)]


def test_chat_hands_on_the_question(called):
    calls = called("chat.chat")
    assert run("chat", "some/model", "--prompt", "Hello?", "--max-new-tokens", "5") == 0
    [(given, named)] = calls
    assert given == ("some/model",)
    assert (named["prompts"], named["max_new_tokens"]) == (["Hello?"], 5)


def test_merge_hands_on_the_folders(called, tmp_path):
    calls = called("merge.merge_adapter")
    assert run("merge", "adapter", "out", "--base", "base") == 0
    [(given, _)] = calls
    assert [str(path) for path in given] == ["adapter", "out", "base"]


def options() -> list[tuple[str, typer.core.TyperOption]]:
    """Every option of every verb."""
    verbs = typer.main.get_command(app).commands.items()
    return [(verb, option) for verb, found in verbs for option in found.params if option.param_type_name == "option"]


@pytest.mark.parametrize(("verb", "option"), [pytest.param(*one, id=f"{one[0]}{one[1].opts[0]}") for one in options()])
def test_help_says_what_holds_without_an_option(verb, option):
    """typer shows a value, a flag is off and a list empty; where nothing stands the text says what there is then."""
    assert option.help
    if option.default is None and not option.required:
        assert re.search("default|[Ww]ithout", option.help)
    elif not option.is_flag and not option.multiple:
        assert option.show_default
