"""The loop, the step, what is measured, and the report."""

from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.evaluate import Evaluation, Sample
from lowrank.training.loop import fit
from lowrank.training.loss import supervised_loss
from lowrank.training.norms import lean_norms
from lowrank.training.optim import build_optimizer
from lowrank.training.schedule import build_schedule
from lowrank.training.steps import run_length

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
