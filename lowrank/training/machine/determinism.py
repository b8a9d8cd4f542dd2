"""Kernels that give the same bits each time: on a card a resumed run ends as it would have with these alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowrank.errors import InputError, first_line

_WORKSPACE, _CHOSEN = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_SAME_EACH_TIME = (":4096:8", ":16:8")  # NVIDIA's documentation of cuBLAS, "Results reproducibility"

# Whether CUDA, which reads the workspace's size once in a process, has begun with the chosen one.
_begun_so = [False]


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """While it lasts torch, cuBLAS, cuDNN and FlashAttention take kernels that give the same bits each time.

    Afterwards all is as it was, but for cuBLAS, which goes on with the workspace that it began with.

    Args:
        wanted: False changes nothing.

    Raises:
        InputError: CUDA has begun in this process without; or an operation has no such kernel.
    """
    if not wanted:
        yield
        return
    before = os.environ.get(_WORKSPACE)
    _choose_workspace(before)
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise InputError(
            f"this run has no deterministic kernel for all that it computes: {first_line(error).partition(',')[0]}",
            where="training.deterministic",
            fix="Leave it out, or leave out what needs that operation.",
        ) from error
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        torch.use_deterministic_algorithms(enabled, warn_only=only_warns)
        _give_back_workspace(before)


def _choose_workspace(before: str | None) -> None:
    if before in _SAME_EACH_TIME:
        return
    if torch.cuda.is_initialized() and not _begun_so[0]:
        raise InputError(
            f"CUDA has begun in this process, and {_WORKSPACE} is {before or 'not set'}",
            where="training.deterministic",
            fix=f"Start the run in a process of its own, or set {_WORKSPACE}={_CHOSEN} before the first use of CUDA.",
        )
    os.environ[_WORKSPACE] = _CHOSEN


def _give_back_workspace(before: str | None) -> None:
    _begun_so[0] |= torch.cuda.is_initialized()
    if before is None:
        os.environ.pop(_WORKSPACE, None)
    else:
        os.environ[_WORKSPACE] = before
