"""What an optimiser is made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupRule:
    """What some parameters are trained with.

    Attributes:
        pattern: A regular expression that is searched for in the parameter's name.
        learning_rate: None for the run's.
        weight_decay: None for the run's.
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """What an optimiser is made with.

    Attributes:
        learning_rate: The highest.
        weight_decay: On matrices, embeddings among them; biases, norms and magnitudes are vectors and go without.
        betas: Of AdamW and Lion; Muon's momentum is the first. Adafactor and SGD have none.
        epsilon: AdamW's.
        loraplus_lr_ratio: LoRA+ (Hayou 2024): B learns so many times as fast as A; None for the same.
        loraplus_lr_embedding: With LoRA+, the learning rate of embeddings' factors.
        rules: Stand before all that; of several that fit a parameter, the first.
    """

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    rules: Sequence[GroupRule] = ()
