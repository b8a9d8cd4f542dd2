"""The loop, the step, what is measured, and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.lazily import on_first_use

if TYPE_CHECKING:
    from lowrank.training.evaluation.evaluation import Evaluation as Evaluation
    from lowrank.training.evaluation.evaluation import Sample as Sample
    from lowrank.training.loop import fit as fit
    from lowrank.training.losses.supervised import supervised_loss as supervised_loss
    from lowrank.training.optimisers.build import build_optimizer as build_optimizer
    from lowrank.training.optimisers.schedule import build_schedule as build_schedule
    from lowrank.training.run import Callback as Callback
    from lowrank.training.run import Run as Run
    from lowrank.training.run import StepMetrics as StepMetrics
    from lowrank.training.steps import run_length as run_length
    from lowrank.training.transforms.norms import lean_norms as lean_norms

__getattr__, __dir__, __all__ = on_first_use(__name__, __file__)
