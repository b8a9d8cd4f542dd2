"""Sweeps: each run's folder holds what `lowrank train` with its config gives, whatever trained beside it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lowrank.config import load_config
from lowrank.config.loading import ConfigError
from lowrank.config.sweeping import read_sweep
from lowrank.errors import InputError
from lowrank.recipes import sweep as sweeping
from lowrank.recipes.sweep import sweep
from lowrank.recipes.train import train
from lowrank.training import side_by_side

TRAINING = {"max_steps": 5, "num_train_epochs": 1, "report_to": "none", "tokens_per_batch": 128, "save_steps": 2}


@pytest.fixture
def sweep_config(write_config):
    """Writes a config with a section `sweep`."""

    def write(varied: dict, name: str = "sweep.yaml", **sections: dict):
        path = write_config(name, **{**sections, "training": {**TRAINING, **sections.get("training", {})}})
        path.write_text(path.read_text() + yaml.safe_dump({"sweep": varied}, sort_keys=False))
        return path

    return write


VARIED = {"training.learning_rate": [3e-3, 1e-3], "adapter.r": [2, 4], "training.seed": [1, 2]}


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_each_run_is_what_it_is_alone(sweep_config, tmp_path, monkeypatch):
    passes = []
    joined = side_by_side.joined
    monkeypatch.setattr(side_by_side, "joined", lambda packs: passes.append(len(packs)) or joined(packs))
    training = {"gradient_accumulation_steps": 2, "eval_steps": 2, "predict_with_generate": True}
    training |= {"generation_max_new_tokens": 4}
    result = sweep(sweep_config({**VARIED, "training.max_steps": [3, 5]}, training=training))
    assert max(passes) > 8  # as many packs of up to 128 tokens as have room
    assert len(result.outcomes) == 16
    assert not result.interrupted
    for one in [result.outcomes[0], result.outcomes[7], result.outcomes[-1]]:
        folder = tmp_path / "out" / one.name
        alone = train(load_config(folder, [f"training.output_dir={tmp_path / 'alone' / one.name}"]))
        same(adapter_of(folder), adapter_of(alone.output_dir))
        assert one.loss == pytest.approx(alone.after.loss, rel=1e-5)
        lines = [[json.loads(line) for line in (of / "metrics.jsonl").open()] for of in (folder, alone.output_dir)]
        for here, there in zip(*lines, strict=True):
            assert here["kind"] == there["kind"]
            assert here["step"] == there["step"]
            for key in {"loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "supervised"} & there.keys():
                assert here[key] == pytest.approx(there[key], rel=1e-4)
        assert {path.name for path in folder.iterdir()} == {path.name for path in alone.output_dir.iterdir()}
    best = tmp_path / "out" / "best"
    assert adapter_of(best).keys()
    assert (best / "tokenizer_config.json").exists()
    assert load_config(tmp_path / "out" / "best.yaml").training.output_dir == "out-best"
    assert "evaluation loss" in (tmp_path / "out" / "report.html").read_text()


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [3, 4])
def test_a_killed_sweep_goes_on_to_the_same_bytes(sweep_config, tmp_path, monkeypatch, at):
    path = sweep_config({"training.learning_rate": [1e-2, 1e-3], "training.max_steps": [3, 5]})
    sweep(path)
    whole = tmp_path / "whole"
    shutil.move(tmp_path / "out", whole)

    take, steps = side_by_side.take_step, []

    def dies(run, *args):
        steps.append(run.step)
        if len(steps) == at * 3:
            raise _Killed
        return take(run, *args)

    monkeypatch.setattr(side_by_side, "take_step", dies)
    with pytest.raises(_Killed):
        sweep(path)
    monkeypatch.setattr(side_by_side, "take_step", take)
    result = sweep(path, resume=True)
    assert len(result.outcomes) == 4
    for one in result.outcomes:
        name = f"{one.name}/adapter_model.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
        assert len(list((tmp_path / "out" / one.name / "checkpoints").iterdir())) == 2


def test_what_cannot_share_a_pass_runs_by_itself(sweep_config, tmp_path, capsys):
    path = sweep_config({"adapter.lora_dropout": [0.0, 0.5], "training.learning_rate": [1e-2, 1e-3]})
    result = sweep(path)
    assert len(result.outcomes) == 4
    assert all(one.loss is not None for one in result.outcomes)
    assert capsys.readouterr().out.count("adapter.lora_dropout is 0.5; it runs by itself") == 2


def test_a_run_that_is_lost_leaves_the_others_alone(sweep_config, tmp_path):
    path = sweep_config({"training.learning_rate": [1e30, 1e-2]}, training={"max_skipped_steps": 0})
    result = sweep(path)
    assert [one.loss is None for one in result.outcomes] == [False, True]
    assert result.outcomes[1].lost


@pytest.mark.parametrize(
    ("varied", "told"),
    [
        ({"training.output_dir": ["a", "b"]}, "sweep.training.output_dir: cannot vary"),
        ({"training.learning_rate": []}, "sweep.training.learning_rate: is an empty list"),
        ({"training.learning_rate": 1e-3}, "takes a list"),
        ({"training.learningrate": [1e-3]}, "did you mean learning_rate"),
        ({"rate": [1]}, "is no section.key"),
        ({"adapter.r": [8, 0]}, "adapter.r: 0 is not"),
        ({"adapter.r": [8, 8]}, "names 8 twice"),
        ({"adapter.r": list(range(1, 65)), "training.seed": list(range(64))}, "is 4,096 combinations (64 x 64)"),
        ({}, "names nothing to vary"),
    ],
)
def test_mistakes_are_told_with_their_line(sweep_config, varied, told):
    path = sweep_config(varied)
    with pytest.raises(ConfigError, match=r"sweep\.yaml:\d+") as error:
        read_sweep(path)
    assert told in str(error.value)


def test_a_folder_is_one_sweeps(sweep_config, tmp_path):
    path = sweep_config({"training.learning_rate": [1e-2, 1e-3]})
    sweep(path, ["training.max_steps=1"])
    with pytest.raises(InputError, match="holds a sweep already"):
        sweep(path)
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(sweep_config({"training.learning_rate": [1e-2, 2e-3]}), resume=True)
    with pytest.raises(InputError, match=r"held-out rows"):
        sweep(path, ["data.eval=null", "training.output_dir=other"])
    assert sweeping.STATE in {one.name for one in (tmp_path / "out").iterdir()}


def test_train_says_whose_section_it_is(sweep_config):
    with pytest.raises(ConfigError, match=r"sweep\.yaml:\d+: sweep: is a section of what `lowrank sweep` is given"):
        load_config(sweep_config({"adapter.r": [2, 4]}))


def test_what_is_set_stands_before_the_list(sweep_config):
    path = sweep_config({"training.learning_rate": [1e-2, 1e-3], "adapter.r": [2, 4]})
    planned = read_sweep(path, ["sweep.training.learning_rate=[1e-4]"])
    names = [one.name for one in planned.combinations]
    assert names == ["learning_rate-0.0001_r-2", "learning_rate-0.0001_r-4"]


def test_a_key_stands_once(sweep_config):
    path = sweep_config({"training.learning_rate": [1e-2], "training": {"learning_rate": [1e-3]}})
    with pytest.raises(ConfigError, match=r"sweep\.yaml:\d+: sweep\.training\.learning_rate: stands at .* already"):
        read_sweep(path)
