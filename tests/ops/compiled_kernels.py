"""Compiles the kernels for cards that are not there, with the arguments that the functions around them hand over: run by
`test_kernels_compile.py` in a process of its own, where nothing is interpreted. Prints a line for each machine code."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowrank.ops.kernels.gate_rows import gate_rows
from lowrank.ops.kernels.loss_rows import loss_rows
from lowrank.ops.kernels.norm_rows import norm_rows
from lowrank.ops.kernels.rotation import rotated

_launch = JITFunction.run


def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
    found = _launch(self, *args, grid=grid, warmup=True, **kwargs)
    print(f"{self.fn.__name__} {found.metadata.target.arch} {len(found.asm['cubin'])}")


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def norms() -> None:
    for dtype, width, rounded_first, one_plus in (
        (torch.bfloat16, 576, True, False),
        (torch.float32, 1, True, True),
        (torch.float16, 16384, False, False),
    ):
        norm_rows(
            drawn(5, width, dtype=dtype), drawn(width, dtype=dtype), 1e-5, rounded_first, one_plus
        ).sum().backward()
    norm_rows(drawn(1, 64), drawn(64).detach(), 1e-5, True, False).sum().backward()


def gates() -> None:
    for name, dtype in (("silu", torch.bfloat16), ("gelu_tanh", torch.float32)):
        one, other = drawn(7, 2 * 1536, dtype=dtype).chunk(2, -1)
        gate_rows(one, other, name).sum().backward()
    gate_rows(drawn(1, 1), drawn(1, 1), "silu").sum().backward()


def rotations() -> None:
    for dtype, heads, d, r in ((torch.bfloat16, 9, 64, 64), (torch.float16, 1, 80, 32), (torch.float32, 2, 2, 2)):
        q, k = drawn(1, 6, heads, d, dtype=dtype).transpose(1, 2), drawn(1, 6, 1, d, dtype=dtype).transpose(1, 2)
        cos, sin = torch.randn(1, 6, r).to(dtype), torch.randn(1, 6, r).to(dtype)
        torch.cat(rotated(q, k, cos, sin, dtype, dtype), 1).sum().backward()


def losses() -> None:
    plain = {"logit_scale": 1.0, "softcap": None, "label_smoothing": 0.0, "z_loss": 0.0}
    every = {"logit_scale": 0.5, "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    for dtype, vocabulary, options in (
        (torch.bfloat16, 49152, plain),
        (torch.float16, 1, every),
        (torch.float32, 257, every),
    ):
        for weights in (None, torch.ones(3)):
            logits = drawn(3, vocabulary, dtype=dtype).detach()
            loss_rows(logits, torch.zeros(3, dtype=torch.long), weights, **options, gradient=weights is not None)


def main() -> None:
    JITFunction.run = compile_only
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(
            SimpleNamespace(
                get_current_target=lambda target=target: target,
                get_current_device=lambda target=target: target.arch,
                get_current_stream=lambda device: 0,
            )
        )
        for compiled in (norms, gates, rotations, losses):
            compiled()


if __name__ == "__main__":
    main()
