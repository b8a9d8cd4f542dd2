"""The objectives that learn from preferences, as far as a config needs to know them: nothing here loads torch.

Each is a file beside this one, a line here and one in `objectives.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SFT = "sft"
"""The next token: what all other parts of a run are about."""


@dataclass(frozen=True, slots=True)
class ObjectiveKind:
    """What an objective asks for.

    Attributes:
        defaults: Its numbers, by the names that they have in the training section, and what they are by default.
        loss_types: What `training.loss_type` can be, the default first; where there is but one it has no name.
        smooths: Under which of them `training.label_smoothing` has a meaning.
        margins: Under which of them a row's margin has one.
        estimates: Under which of them the KL is estimated from answers to other prompts.
        paired: Whether it learns from pairs; otherwise each answer has a label.
        referenced: Whether answers are compared with what a reference makes of them.
        prompts: Whether the chosen answer's prompt is learned too.
    """

    defaults: Mapping[str, float]
    loss_types: tuple[str, ...] = ("",)
    smooths: tuple[str, ...] = ()
    margins: tuple[str, ...] = ()
    estimates: tuple[str, ...] = ()
    paired: bool = True
    referenced: bool = False
    prompts: bool = False

    def mismatched(self, loss_type: str | None) -> bool:
        """Whether a loss of this type asks what the model makes of another row's answer to each prompt."""
        return (loss_type or self.loss_types[0]) in self.estimates

    @property
    def keys(self) -> tuple[str, ...]:
        """What it obeys of `KEYS`."""
        types = ("loss_type",) if len(self.loss_types) > 1 else ()
        smoothing = ("label_smoothing",) if self.smooths else ()
        return *self.defaults, *types, *smoothing, *(("reference",) if self.referenced else ())


OBJECTIVE_KINDS: dict[str, ObjectiveKind] = {
    "dpo": ObjectiveKind(
        {"beta": 0.1},
        ("sigmoid", "hinge", "robust", "apo_zero", "apo_down"),
        smooths=("sigmoid", "robust"),
        margins=("sigmoid", "hinge", "robust"),
        referenced=True,
    ),
    "ipo": ObjectiveKind({"beta": 0.1}, referenced=True),
    "simpo": ObjectiveKind({"beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}, smooths=("",)),
    "cpo": ObjectiveKind({"beta": 0.1, "cpo_alpha": 1.0}, ("sigmoid", "hinge"), smooths=("sigmoid",)),
    "orpo": ObjectiveKind({"beta": 0.1}, prompts=True),
    "kto": ObjectiveKind(
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        ("kto", "apo_zero_unpaired"),
        estimates=("kto",),
        paired=False,
        referenced=True,
    ),
}

MEASURED = ("accuracy", "margin")
"""What evaluations of preferences measure beside the loss, and a run can be judged by."""
KEYS = tuple(dict.fromkeys(key for kind in OBJECTIVE_KINDS.values() for key in kind.keys))
"""Of the training section, all that is about preferences."""
