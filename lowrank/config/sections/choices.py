"""The names that a config takes from the tables of the rooms that it speaks for: a line in a table is a name here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from lowrank.attention.backend_names import BACKEND_NAMES
from lowrank.data.reading.formats import FORMATS
from lowrank.quantisers.registry import QUANTISERS
from lowrank.tasks.kinds_of_task import CAUSAL_LM, TASK_KINDS
from lowrank.training.evaluation.best import GREATER_IS_BETTER
from lowrank.training.evaluation.comparisons import COMPARISONS
from lowrank.training.losses.objective_kinds import OBJECTIVE_KINDS, SFT
from lowrank.training.optimisers.schedule import SCHEDULES
from lowrank.training.optimisers.table import OPTIMIZERS

if TYPE_CHECKING:  # to type checkers they are texts: they do not read tables
    Attention: TypeAlias = str
    Comparison: TypeAlias = str
    Format: TypeAlias = str
    LossType: TypeAlias = str
    Metric: TypeAlias = str
    Objective: TypeAlias = str
    Optim: TypeAlias = str
    QuantMethod: TypeAlias = str
    Schedule: TypeAlias = str
    Task: TypeAlias = str
else:
    Attention = Literal["auto", *BACKEND_NAMES]
    Comparison = Literal[tuple(COMPARISONS)]
    Format = Literal[tuple(FORMATS)]
    LossType = Literal[tuple(name for kind in OBJECTIVE_KINDS.values() for name in kind.loss_types if name)]
    Metric = Literal[tuple(GREATER_IS_BETTER)]
    Objective = Literal[SFT, *OBJECTIVE_KINDS]
    Optim = Literal[tuple(OPTIMIZERS)]
    QuantMethod = Literal[tuple(QUANTISERS)]
    Schedule = Literal[tuple(SCHEDULES)]
    Task = Literal[CAUSAL_LM, *TASK_KINDS]
