"""The loop, the step, what is measured, and the report."""

from lowrank.training.evaluation.evaluation import Evaluation, Sample
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import supervised_loss
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.schedule import build_schedule
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.steps import run_length
from lowrank.training.transforms.norms import lean_norms

__all__ = [
    "Callback",
    "Evaluation",
    "Run",
    "Sample",
    "StepMetrics",
    "build_optimizer",
    "build_schedule",
    "fit",
    "lean_norms",
    "run_length",
    "supervised_loss",
]
