"""Every path on the command line follows the rule of paths: variables that are not set are named, `~` is home."""

from __future__ import annotations

import pytest
from tiny import tiny_llama, tiny_tokenizer

from lowrank.cli import main

NOPE = "$NOPE_NOT_SET/x"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["check", NOPE], ["preview", NOPE], ["train", NOPE], ["eval", NOPE], ["chat", NOPE], ["info", NOPE]),
        *(["init", NOPE, "--model", "m"], ["init", "d", "--model", NOPE], ["init", "d", NOPE, "--model", "m"]),
        *(["merge", NOPE, "out"], ["merge", "a", NOPE], ["merge", "a", "out", "--base", NOPE]),
        *(["compose", "a", NOPE, "--out", "b"], ["compose", "a", "--out", NOPE], ["resize", NOPE, "b"]),
        *(["resize", "a", NOPE], ["extract", NOPE, "b", "c"], ["extract", "a", NOPE, "c"], ["extract", "a", "b", NOPE]),
        *(["export", NOPE, "b", "--to", "vllm"], ["export", "a", NOPE, "--to", "vllm"]),
        *(["eval", "run.yaml", "--adapter", NOPE], ["preview", "run.yaml", "--html", NOPE]),
        ["train", "run.yaml", "--set", f"training.output_dir={NOPE}"],
    ],
    ids=" ".join,
)
def test_a_variable_that_is_not_set_is_named(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "model: {name_or_path: m}\ndata: {train: t, eval: e}\ntraining: {output_dir: o}\n", encoding="utf-8"
    )
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "variable NOPE_NOT_SET" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


def test_home_is_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "home" / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "home" / "base")
    (tmp_path / "home" / "rows.csv").write_text("prompt,completion\n1+1,2\n")
    with pytest.raises(SystemExit):
        main(["init", "~/rows.csv", "~/run.yaml", "--model", "~/base", "--no-check"])
    assert (tmp_path / "home" / "run.yaml").is_file()
    assert not (tmp_path / "~").exists()


def test_the_cache_of_tokens_follows_it_too(monkeypatch):
    from lowrank.data.loading.store import cache_root

    monkeypatch.setenv("HOME", "/home/me")
    for given, root in (("~/c", "/home/me/c"), ("$HOME/c", "/home/me/c"), ("", "/home/me/.cache/lowrank")):
        monkeypatch.setenv("LOWRANK_CACHE", given)
        assert str(cache_root()) == f"{root}/tokens"
