"""The names that a command takes are those that the code has."""

from __future__ import annotations

from typing import get_args

from lowrank.weights.arithmetic.combine import FACTOR_METHODS
from lowrank.weights.arithmetic.compose_methods import ComposeMethod
from lowrank.weights.export_targets import Target
from lowrank.weights.exporting import _WRITERS


def test_methods_of_composing():
    on_products = {f"{method}_svd" for method in FACTOR_METHODS if method != "linear"}
    assert set(get_args(ComposeMethod)) == {"cat", "svd", *FACTOR_METHODS, *on_products}


def test_targets_of_exports():
    assert get_args(Target) == tuple(_WRITERS)
