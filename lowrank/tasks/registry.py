"""The tasks by name: each is a file, a line here and in `kinds_of_task.py`, and its rows in `task_formats.py`."""

from __future__ import annotations

from lowrank.tasks.reward_model import Reward
from lowrank.tasks.sequence_classification import SequenceClassification
from lowrank.tasks.task import TaskClass
from lowrank.tasks.text_embedding import Embedding
from lowrank.tasks.token_classification import TokenClassification

TASKS: dict[str, TaskClass] = {
    "sequence_classification": SequenceClassification(),
    "token_classification": TokenClassification(),
    "embedding": Embedding(),
    "reward": Reward(),
}
