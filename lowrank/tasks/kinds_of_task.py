"""The tasks by name, as far as a config needs to know them: nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass

CAUSAL_LM = "causal_lm"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a task is to other programs.

    Attributes:
        auto_class: transformers' class that loads its models.
        task_type: peft's word for it.
        pipeline: The hub's word for it.
        metrics: What its evaluations measure beside the loss.
        wishes: The config's keys about labels that its loss obeys.
    """

    auto_class: str
    task_type: str
    pipeline: str
    metrics: tuple[str, ...]
    wishes: tuple[str, ...] = ()


LABEL_KEYS = "model.problem_type", "training.class_weights", "training.label_smoothing_factor"
"""What a config may ask of the loss of labels."""


REWARD_LABELS = {0: "reward"}
"""By their names in its config a reward model is told from other classifiers of texts."""

TASK_KINDS: dict[str, Kind] = {
    "sequence_classification": Kind(
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        "text-classification",
        ("accuracy", "f1", "mcc", "pearson", "mse"),
        LABEL_KEYS,
    ),
    "token_classification": Kind(
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
        "token-classification",
        ("f1", "precision", "recall", "accuracy"),
        ("training.label_smoothing_factor",),
    ),
    "embedding": Kind("AutoModel", "FEATURE_EXTRACTION", "sentence-similarity", ("recall@1", "recall@10", "ndcg@10")),
    "reward": Kind("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", ("accuracy", "margin")),
}
