"""The examples for several machines, on one: Ray is a stand-in that calls what it is handed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from short_run import base, write_config

import lowrank

__all__ = ["base", "write_config"]

FOLDER = Path(__file__).parents[2] / "examples" / "multi_node"


@dataclass
class Given:
    """ScalingConfig and RunConfig."""

    num_workers: int | None = None
    use_gpu: bool | None = None
    storage_path: str | None = None
    name: str | None = None


@dataclass
class TorchTrainer:
    """As Ray's, with one worker in this process."""

    work: Any
    train_loop_config: dict[str, Any]
    scaling_config: Given
    run_config: Given

    def fit(self) -> None:
        assert (self.scaling_config.num_workers, self.scaling_config.use_gpu) == (1, False)
        self.work(self.train_loop_config)


@pytest.fixture
def ray(monkeypatch):
    train, torch_part = ModuleType("ray.train"), ModuleType("ray.train.torch")
    train.RunConfig = train.ScalingConfig = Given  # type: ignore[attr-defined]
    torch_part.TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    for name, module in (("ray", ModuleType("ray")), ("ray.train", train), ("ray.train.torch", torch_part)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FOLDER))


def test_ray_runs_the_config(ray, write_config, tmp_path, monkeypatch):
    import ray_train  # pyrefly: ignore [missing-import]

    trained: list[lowrank.config.RunConfig] = []
    train = lowrank.train

    def seen(config, overrides):
        trained.append(lowrank.config.load_config(config, overrides))
        return train(config, overrides)

    monkeypatch.setattr(lowrank, "train", seen)
    options = ["run.yaml", "--workers", "1", "--cpu", "--set", "training.max_steps=2"]
    write_config()
    monkeypatch.setattr(sys, "argv", ["ray_train.py", *options])
    ray_train.main()
    assert (trained[0].training.num_processes, trained[0].training.max_steps) == (1, 2)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_runs_the_config(write_config, tmp_path):
    path = write_config(training={"max_steps": 2, "gradient_accumulation_steps": 1})
    binaries = Path(sys.executable).parent
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "CARDS": "2", "OMP_NUM_THREADS": "1"}
    script = ["sh", str(FOLDER / "torchrun.sh"), str(path), "--set", "training.output_dir=together"]
    told = subprocess.run(script, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert told.stdout.count("this run") == 1  # one process prints
    assert (tmp_path / "together" / "adapter_model.safetensors").exists()
