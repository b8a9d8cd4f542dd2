"""Figures of answers against labels, by scikit-learn."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank.errors import InputError
from lowrank.tasks.labels import MULTI, REGRESSION


def _library(name: str) -> Any:
    """A library of the extra `metrics`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"evaluating this task needs {name.partition('.')[0]}, which is not installed",
            where="data.eval",
            fix="Install it: pip install 'lowrank[metrics]'; or leave data.eval out.",
        ) from None


def classification_scores(kind: str, expected: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews' correlation of classes; F1 and accuracy of sets of them; Pearson's correlation
    and the mean squared error of numbers.

    Args:
        kind: The problem's type.
        expected: Numbers of classes (n,), ones and zeros (n, k), or numbers (n,).
        predicted: In the same form.
    """
    metrics = _library("sklearn.metrics")
    if kind == REGRESSION:
        scores = {"mse": float(metrics.mean_squared_error(expected, predicted))}
        if min(np.ptp(expected), np.ptp(predicted)) > 0:  # a correlation with what never changes is none
            scores["pearson"] = float(np.corrcoef(expected, predicted)[0, 1])
        return scores
    scores = {
        "accuracy": float(metrics.accuracy_score(expected, predicted)),
        "f1": float(metrics.f1_score(expected, predicted, average="macro", zero_division=0)),
    }
    if kind == MULTI:
        return scores
    with warnings.catch_warnings():  # of one class alone it is 0, and scikit-learn warns of that
        warnings.simplefilter("ignore", UserWarning)
        return {**scores, "mcc": float(metrics.matthews_corrcoef(expected, predicted))}


def tag_scores(expected: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities by seqeval where tags are such (B-PER, I-PER, O), else macro F1 of words;
    and the accuracy of words.

    Args:
        expected: The tags of each row.
        predicted: As many.
    """
    flat = [[tag for tags in rows for tag in tags] for rows in (expected, predicted)]
    accuracy = float(_library("sklearn.metrics").accuracy_score(*flat))
    if all(tag == "O" or tag[:2] in ("B-", "I-", "E-", "S-") for tag in {*flat[0], *flat[1]}):
        metrics = _library("seqeval.metrics")
        found = {name: getattr(metrics, f"{name}_score")(expected, predicted, zero_division=0) for name in _ENTITIES}
        return {**{name: float(value) for name, value in found.items()}, "accuracy": accuracy}
    f1 = _library("sklearn.metrics").f1_score(*flat, average="macro", zero_division=0)
    return {"f1": float(f1), "accuracy": accuracy}


_ENTITIES = ("f1", "precision", "recall")


def retrieval_scores(
    anchors: np.ndarray, positives: np.ndarray, asked: Sequence[bytes], found: Sequence[bytes]
) -> dict[str, float]:
    """Recall among the first 1 and the first 10, and nDCG of the first 10, of each row's own positive among all.

    Other positives of an equal anchor, and equal positives, are left out of a row's ranking. Of equal scores the row's
    own counts as the last.

    Args:
        anchors: (n, d).
        positives: (n, d).
        asked: What the anchors are, equal for equal ones.
        found: The same of the positives.
    """
    numbers = [np.unique(np.array([key.hex() for key in keys]), return_inverse=True)[1] for keys in (asked, found)]
    anchor_of, positive_of = numbers
    first = np.zeros(len(found), dtype=bool)
    first[np.unique(positive_of, return_index=True)[1]] = True
    ranks = np.empty(len(anchors), dtype=np.int64)
    for at, anchor in enumerate(anchors):
        scores = positives @ anchor
        right = np.isin(positive_of, positive_of[anchor_of == anchor_of[at]])
        ranks[at] = int((scores[first & ~right] >= scores[at]).sum())
    gains = np.where(ranks < _LOOKED_AT, 1.0 / np.log2(ranks + 2.0), 0.0)
    recalls = {f"recall@{k}": float((ranks < k).mean()) for k in (1, _LOOKED_AT)}
    return {**recalls, f"ndcg@{_LOOKED_AT}": float(gains.mean())}


_LOOKED_AT = 10
