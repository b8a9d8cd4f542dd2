"""Deterministic kernels last as long as the run that asks for them."""

from __future__ import annotations

import os

import pytest
import torch

from lowrank.errors import InputError
from lowrank.training.machine import determinism
from lowrank.training.machine.determinism import deterministic_kernels

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def _state() -> tuple:
    cudnn = torch.backends.cudnn
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    on = torch.are_deterministic_algorithms_enabled(), warns
    return (*on, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, os.environ.get(WORKSPACE))


@pytest.fixture(autouse=True)
def _another_state(monkeypatch):
    """None of the values is the one that the switch sets, nor are all what a process begins with."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(determinism, "_begun_so", [False])
    monkeypatch.setenv(WORKSPACE, ":0:0")


@pytest.mark.parametrize("workspace", [None, ":0:0", ":16:8"])
def test_all_is_set_and_given_back(workspace, monkeypatch):
    if workspace is None:
        monkeypatch.delenv(WORKSPACE)
    else:
        monkeypatch.setenv(WORKSPACE, workspace)
    before = _state()
    with deterministic_kernels(True):
        assert _state() == (True, False, True, False, False, ":16:8" if workspace == ":16:8" else ":4096:8")
    assert _state() == before
    with pytest.raises(ZeroDivisionError), deterministic_kernels(True):
        raise ZeroDivisionError
    assert _state() == before
    with deterministic_kernels(False):
        assert _state() == before


def test_an_operation_without_such_a_kernel_is_refused_by_name():
    before = _state()
    with pytest.raises(InputError, match=r"put_ does not have a deterministic implementation\n") as refused:  # noqa: SIM117
        with deterministic_kernels(True):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert refused.value.where == "training.deterministic"
    assert _state() == before


def test_a_process_whose_cuda_has_begun_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = _state()
    with pytest.raises(InputError, match=f"CUDA has begun in this process, and {WORKSPACE} is :0:0"):  # noqa: SIM117
        with deterministic_kernels(True):
            pass
    assert _state() == before
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()


def test_a_second_run_after_one_under_which_cuda_has_begun(monkeypatch):
    with deterministic_kernels(True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic_kernels(True):
        assert os.environ[WORKSPACE] == ":4096:8"
