"""A config on a Ray cluster: Ray places the processes and lets them find one another, lowrank does the rest.

    python examples/multi_node/ray_train.py configs/quickstart.yaml --workers 2

Needs `pip install "ray[train]"`. Each worker trains on one GPU, or on the CPU with --cpu.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(options: dict[str, Any]) -> None:
    """What each worker does: the paths of the config are relative to the folder that the command was given in."""
    import lowrank

    os.chdir(options["folder"])
    lowrank.train(options["config"], options["overrides"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a lowrank config with Ray Train.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, required=True, help="processes")
    parser.add_argument("--cpu", action="store_true", help="on CPUs")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    overrides = [*given.overrides, f"training.num_processes={given.workers}"]
    trainer = TorchTrainer(
        work,
        train_loop_config={"folder": str(Path.cwd()), "config": str(given.config), "overrides": overrides},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=RunConfig(storage_path=str(Path.cwd() / ".ray"), name="lowrank"),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
