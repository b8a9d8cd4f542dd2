"""A run that was killed goes on as if it had not been: the same bytes at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import start

import lowrank
from lowrank.cli import main
from lowrank.config import load_config
from lowrank.errors import InputError, JobError
from lowrank.recipes.parts.resume import refuse_another_config
from lowrank.training.checkpoints.writer import checkpoints_in
from lowrank.training.run import Callback

KILLED = -signal.SIGKILL
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def long_run(write_config, tmp_path):
    """Dropout, packs, shuffling, two epochs, accumulation, evaluations and checkpoints in between."""
    return write_config(
        adapter={"lora_dropout": 0.2},
        data={"max_length": 64},
        training={
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "eval_steps": 3,
            "save_steps": 2,
        },
    )


@pytest.fixture
def uninterrupted(long_run, tmp_path) -> bytes:
    """The adapter file of the run that nothing happened to."""
    result = lowrank.train(long_run, ["training.output_dir=straight"])
    assert result.steps >= 8
    return (result.output_dir / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    "dies", [("step", 0), ("step", 3), ("eval", 0), ("eval", 1), ("save", 0), ("save", 2), ("rename", 1), ("step", 7)]
)
def test_killed_at_a_moment(long_run, uninterrupted, tmp_path, dies):
    first = start(tmp_path, ["train", str(long_run)], dies, workers=True)
    first.join(100)
    assert first.exitcode == KILLED, (tmp_path / "out.txt").read_text()
    resumed = start(tmp_path, ["train", str(long_run), "--resume"], workers=True)
    resumed.join(100)
    assert resumed.exitcode == 0, (tmp_path / "out.txt").read_text()
    assert (tmp_path / "out" / ADAPTER).read_bytes() == uninterrupted
    assert_whole_metrics(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("moment", [0, 1])
def test_killed_as_it_is_resumed(long_run, uninterrupted, tmp_path, moment):
    """While the metrics so far, or the config, are put in their places: both are rewritten by every resume."""
    for dies, resume in ((("step", 5), []), (("whole", moment), ["--resume"])):
        killed = start(tmp_path, ["train", str(long_run), *resume], dies)
        killed.join(100)
        assert killed.exitcode == KILLED, (tmp_path / "out.txt").read_text()
    lowrank.train(long_run, resume=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == uninterrupted
    assert_whole_metrics(tmp_path / "out", tmp_path / "straight")


def test_killed_before_there_is_a_config(long_run, tmp_path):
    killed = start(tmp_path, ["train", str(long_run)], ("whole", 0))
    killed.join(100)
    assert killed.exitcode == KILLED, (tmp_path / "out.txt").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".config.yaml.unfinished"]
    with pytest.raises(InputError, match="holds no run to resume"):
        lowrank.train(long_run, resume=True)
    assert lowrank.train(long_run, ["training.max_steps=1"]).steps == 1


@pytest.mark.slow
def test_killed_at_twenty_random_instants(long_run, uninterrupted, tmp_path):
    """In a step, a save, an evaluation, or before the first of them: wherever it happens to be."""
    began = time.monotonic()
    whole = start(tmp_path, ["train", str(long_run), "--set", "training.output_dir=timed"], workers=True)
    whole.join()
    took = time.monotonic() - began
    rng = random.Random(0)
    for number in range(20):
        folder = f"run{number}"
        arguments = ["train", str(long_run), "--set", f"training.output_dir={folder}"]
        deaths = 0
        while True:
            resume = ["--resume"] if (tmp_path / folder / "config.yaml").exists() else []
            process = start(tmp_path, [*arguments, *resume], workers=True)
            process.join(rng.uniform(0.2, 1.0) * took if deaths < 3 else 100)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            deaths += 1
        assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
        assert (tmp_path / folder / ADAPTER).read_bytes() == uninterrupted, number


def assert_whole_metrics(found, expected) -> None:
    """The same lines but for times, each once."""
    first, second = (lines_of(folder) for folder in (found, expected))
    timed = {"seconds", "data_seconds", "tokens_per_second", "supervised_per_second", "peak_bytes"}
    strip = [[{k: v for k, v in line.items() if k not in timed} for line in lines] for lines in (first, second)]
    assert strip[0] == strip[1]


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Interrupt(Callback):
    """A signal after a step, Ctrl-C by default; those of machines come again and again."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_end(self, run, metrics) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), self.number)

    def on_save(self, run, path) -> None:
        if run.step == self.step and self.number in (signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_interrupted_and_resumed_with_the_command_that_it_names(long_run, uninterrupted, tmp_path, capsys, number):
    result = lowrank.train(long_run, callbacks=[Interrupt(3, number)])
    assert (result.interrupted, result.steps) == (True, 3)
    command = capsys.readouterr().out.strip().rsplit("To go on: lowrank ", 1)[1]
    with pytest.raises(SystemExit) as exited:
        main(command.split())
    assert not exited.value.code
    assert (tmp_path / "out" / ADAPTER).read_bytes() == uninterrupted
    assert_whole_metrics(tmp_path / "out", tmp_path / "straight")


def test_a_finished_run_can_be_resumed_and_stays_the_same(long_run, uninterrupted, tmp_path):
    result = lowrank.train(long_run, ["training.output_dir=straight"], resume=True)
    assert (result.output_dir / ADAPTER).read_bytes() == uninterrupted
    assert result.before is not None


def test_a_changed_config_is_refused_with_the_difference(long_run, tmp_path):
    lowrank.train(long_run, ["training.max_steps=2"])
    before = (tmp_path / "out" / ADAPTER).read_bytes()
    with pytest.raises(InputError, match=r"training.learning_rate: 0.01, now 0.02"):
        lowrank.train(long_run, ["training.max_steps=2", "training.learning_rate=0.02"], resume=True)
    with pytest.raises(InputError, match=r"adapter.r: 4, now 8"):
        lowrank.train(long_run, ["training.max_steps=2", "adapter.r=8"], resume=True)
    with pytest.raises(InputError, match=r"planned for 2 steps and is now to take 4"):
        lowrank.train(long_run, ["training.max_steps=4"], resume=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == before
    lowrank.train(long_run, ["training.max_steps=2", "training.logging_steps=7"], resume=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == before


def test_more_steps_with_a_schedule_that_does_not_look_ahead(long_run, tmp_path):
    constant = ["training.lr_scheduler_type=constant", "training.warmup_ratio=0", "training.warmup_steps=2"]
    straight = lowrank.train(long_run, [*constant, "training.max_steps=6", "training.output_dir=straight"])
    lowrank.train(long_run, [*constant, "training.max_steps=4"])
    longer = lowrank.train(long_run, [*constant, "training.max_steps=6"], resume=True)
    assert longer.steps == 6
    assert (longer.output_dir / ADAPTER).read_bytes() == (straight.output_dir / ADAPTER).read_bytes()


def test_more_steps_are_refused_where_ranks_shrink_over_all_of_them(long_run, tmp_path):
    text = long_run.read_text().replace("lora_alpha: 8", "method: adalora").replace("  r: 4\n", "  init_r: 4\n")
    long_run.write_text(text.replace("init_r: 4\n", "init_r: 4\n  target_r: 2\n"))
    constant = ["training.lr_scheduler_type=constant", "training.warmup_ratio=0"]
    lowrank.train(long_run, [*constant, "training.max_steps=2"])
    with pytest.raises(InputError, match="planned for 2 steps and is now to take 4; AdaLoRA shrinks its ranks"):
        lowrank.train(long_run, [*constant, "training.max_steps=4"], resume=True)


def test_what_the_best_is_judged_by_cannot_change(long_run):
    answering = ["training.predict_with_generate=true", "training.generation_max_new_tokens=2"]
    kept = load_config(long_run, [*answering, "training.load_best_model_at_end=true"])
    other = load_config(
        long_run, [*answering, "training.load_best_model_at_end=true", "training.generation_max_new_tokens=3"]
    )
    with pytest.raises(InputError, match="generation_max_new_tokens: 2, now 3"):
        refuse_another_config(kept, other, Path("out"))
    free = [load_config(long_run, [*answering, f"training.generation_max_new_tokens={n}"]) for n in (2, 3)]
    refuse_another_config(*free, Path("out"))


def test_nothing_to_resume(long_run, tmp_path):
    with pytest.raises(InputError, match="out holds no run to resume"):
        lowrank.train(long_run, resume=True)
    assert not (tmp_path / "out").exists()


def test_changed_rows_are_refused(long_run, tmp_path):
    lowrank.train(long_run, ["training.max_steps=2"])
    rows = (tmp_path / "train.jsonl").read_text().replace("say 3", "say three")
    (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises(InputError, match="training rows are not those"):
        lowrank.train(long_run, ["training.max_steps=2"], resume=True)


@pytest.mark.parametrize("method", ["dora", "adalora", "full"])
def test_other_methods_resume_to_the_bit(write_config, tmp_path, method):
    adapter = {"dora": {"r": 4}, "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}}
    path = write_config(training={"save_steps": 3})
    config = yaml.safe_load(path.read_text())
    config["adapter"] = {"method": method, **adapter.get(method, {})}
    path.write_text(yaml.safe_dump(config))
    straight = lowrank.train(path, ["training.output_dir=straight"])
    stopped = lowrank.train(path, callbacks=[Interrupt(4)])
    assert stopped.interrupted
    resumed = lowrank.train(path, resume=True)
    assert resumed.steps == straight.steps > 5
    name = "model.safetensors" if method == "full" else ADAPTER
    assert (resumed.output_dir / name).read_bytes() == (straight.output_dir / name).read_bytes()


class Damage(Callback):
    """Spoils what was learned so far."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_gradients(self, run) -> None:
        if run.step == self.step:
            for parameter in run.optimizer.param_groups[0]["params"]:
                parameter.data.mul_(30.0)


def test_the_best_evaluation_is_what_is_saved(write_config, tmp_path):
    path = write_config(training={"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1})
    result = lowrank.train(path, callbacks=[Damage(6)])
    losses = {line["step"]: line["eval_loss"] for line in lines_of(result.output_dir) if line["kind"] == "eval"}
    best = min((loss, step) for step, loss in losses.items() if step)
    assert best[1] < result.steps
    assert result.after.loss == pytest.approx(best[0], rel=1e-6)
    kept = [path.name for path in checkpoints_in(result.output_dir)]
    assert kept == [f"step-{best[1]}", f"step-{result.steps}"]
    taken = (result.output_dir / "checkpoints" / kept[0] / ADAPTER).read_bytes()
    assert (result.output_dir / ADAPTER).read_bytes() == taken


def test_evaluations_in_vain_end_the_run_for_good(write_config, capsys):
    path = write_config(training={"eval_steps": 1, "early_stopping_patience": 1, "load_best_model_at_end": True})
    result = lowrank.train(path, callbacks=[Damage(3)])
    assert (result.steps, result.interrupted) == (3, False)
    assert "stopped early, after step 3" in capsys.readouterr().out
    saved = (result.output_dir / ADAPTER).read_bytes()
    assert saved == (result.output_dir / "checkpoints" / "step-2" / ADAPTER).read_bytes()
    again = lowrank.train(path, resume=True)
    assert again.steps == 3
    assert (again.output_dir / ADAPTER).read_bytes() == saved


class Poison(Callback):
    """Makes the loss of some steps infinite."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_run_start(self, run) -> None:
        self.run = run
        run.model.model.norm.register_forward_hook(self.spoil)

    def spoil(self, module, inputs, output):
        if self.run.model.training and self.run.step + 1 in self.steps:
            return output * float("nan")
        return output


def test_the_last_step_is_judged_also_where_it_was_skipped(write_config):
    path = write_config(training={"eval_steps": 100, "load_best_model_at_end": True, "max_steps": 3})
    result = lowrank.train(path, callbacks=[Poison(3)])
    evaluated = [line["step"] for line in lines_of(result.output_dir) if line["kind"] == "eval"]
    assert evaluated == [0, 3, 3]  # the base, to be judged, and what came out
    assert (result.output_dir / ADAPTER).exists()


class ScaleFarOff(Callback):
    """A loss scale that float16 cannot hold, by eight halvings and more."""

    def on_run_start(self, run) -> None:
        if run.step == 0:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)


def test_float16_finds_its_scale_and_resumes_to_the_bit(write_config):
    """The steps that go by until then are skipped; they are none of those that stop a run."""
    half = [
        "model.dtype=float16",
        "model.compute_dtype=float16",
        "training.num_train_epochs=4",
        "training.max_skipped_steps=1",
    ]
    straight = lowrank.train(write_config(), [*half, "training.output_dir=straight"], callbacks=[ScaleFarOff()])
    skips = [line["step"] for line in lines_of(straight.output_dir) if line["kind"] == "skip"]
    assert len(skips) > 3
    assert straight.steps > len(skips) + 4
    assert straight.after.loss < straight.before.loss
    stopped = lowrank.train(write_config(), half, callbacks=[ScaleFarOff(), Interrupt(len(skips) + 2)])
    assert stopped.interrupted
    resumed = lowrank.train(write_config(), half, resume=True, callbacks=[ScaleFarOff()])
    assert (resumed.output_dir / ADAPTER).read_bytes() == (straight.output_dir / ADAPTER).read_bytes()


class Stop(Callback):
    """Ends the run after a step."""

    def on_step_end(self, run, metrics) -> None:
        run.stop = run.step == 2


def test_stopped_before_there_is_a_best(write_config, capsys):
    path = write_config(training={"eval_steps": 100, "load_best_model_at_end": True})
    result = lowrank.train(path, callbacks=[Stop()])
    assert (result.steps, result.interrupted) == (2, False)
    assert "stopped early, after step 2" in capsys.readouterr().out
    last = result.output_dir / "checkpoints" / "step-2" / ADAPTER
    assert (result.output_dir / ADAPTER).read_bytes() == last.read_bytes()


def test_a_step_that_is_not_finite_is_skipped_and_counted(write_config, tmp_path, capsys):
    path = write_config()
    result = lowrank.train(path, callbacks=[Poison(2, 4)])
    skips = [line["step"] for line in lines_of(result.output_dir) if line["kind"] == "skip"]
    assert skips == [2, 4]
    assert "2 steps were skipped" in capsys.readouterr().out
    assert result.after.loss < result.before.loss


def test_too_many_of_them_stop_the_run_and_keep_the_checkpoint(write_config, tmp_path):
    path = write_config(training={"save_steps": 2, "max_skipped_steps": 2})
    with pytest.raises(JobError, match="3 steps in a row"):
        lowrank.train(path, callbacks=[Poison(3, 4, 5, 6, 7, 8)])
    kept = checkpoints_in(tmp_path / "out")
    assert kept[0].name == "step-2"
    assert (kept[0] / ADAPTER).exists()
