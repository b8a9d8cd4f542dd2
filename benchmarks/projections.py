"""What a layer's projections cost on this CPU: one function each, one for those of one input, and folded.

    OMP_NUM_THREADS=1 python benchmarks/projections.py

Forward and backward of 1,600 tokens through q, k, v and gate, up (which share their input), o and down; LoRA r = 16 in
float32. `shared` is `ops.lora_linears`. `folded` forms W + s B A in float32 where a 16-bit weight is made dense for
float32 products anyway, so that a projection is one product; the gradients of A and B are taken as ever. Each side in
turn with one function each (`ops.lora_linear`), in seconds of one thread's CPU; the median of the pairs' ratios. Writes
benchmarks/results/projections-cpu.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowrank.ops.lora_linear import lora_linear
from lowrank.ops.lora_linears import Projection, lora_linears
from lowrank.ops.low_rank import LowRank

TOKENS, RANK, SCALE = 1600, 16, 2.0
WORTH_FOLDING = 0.97
SHAPES = {"SmolLM2 135M": (576, 1536, 192, 21), "Llama 1B": (2048, 8192, 512, 7)}
"""Hidden, intermediate, keys' width, and how often each side runs."""
Side: TypeAlias = Callable[[torch.Tensor, list[Projection]], list[torch.Tensor]]


class Folded(torch.autograd.Function):
    """x (W + s B A)ᵀ, W + s B A formed for each product and dropped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """(n, out)."""
        low = x @ A.t()
        ctx.save_for_backward(x, W, A, B, low)
        return x @ W.to(x.dtype).addmm_(B, A, alpha=SCALE).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x, A and B."""
        x, W, A, B, low = ctx.saved_tensors
        d_low = (grads[0] @ B).mul_(SCALE)
        d_x = grads[0] @ W.to(x.dtype).addmm_(B, A, alpha=SCALE)
        return d_x, None, d_low.t() @ x, (grads[0].t() @ low).mul_(SCALE)


def alone(x: torch.Tensor, of: list[Projection]) -> list[torch.Tensor]:
    """One function each."""
    return [lora_linear(x, each.weight, None, each.term) for each in of]


def folded(x: torch.Tensor, of: list[Projection]) -> list[torch.Tensor]:
    """One product each."""
    found = [Folded.apply(x, each.weight, each.term.A, each.term.B) for each in of]
    return [y for y in found if isinstance(y, torch.Tensor)]


def ratio(side: Side, widths: list[int], width: int, weights: torch.dtype, products: torch.dtype, runs: int) -> str:
    """CPU time of a side as a part of one function each, and that one's milliseconds."""
    of = []
    for out in widths:
        W = (torch.randn(out, width) * 0.02).to(weights)
        A, B = ((torch.randn(shape) * 0.02).requires_grad_() for shape in ((RANK, width), (out, RANK)))
        of.append(Projection(W, None, LowRank(A, B, SCALE)))
    x = torch.randn(TOKENS, width).to(products).requires_grad_()
    learns = [x, *(factor for each in of for factor in (each.term.A, each.term.B))]
    slopes = [torch.randn(TOKENS, out).to(products) for out in widths]

    def gradients(way: Side) -> tuple[tuple[torch.Tensor, ...], float]:
        began = time.process_time()
        found = torch.autograd.grad(way(x, of), learns, slopes)
        return found, time.process_time() - began

    for one, other in zip(gradients(alone)[0], gradients(side)[0], strict=True):
        assert (one - other).abs().max() <= (1e-5 if products == torch.float32 else 3e-2) * one.abs().max()
    pairs = []
    for run in range(runs):
        order = (alone, side) if run % 2 else (side, alone)
        spent = {way: gradients(way)[1] for way in order}
        pairs.append((spent[alone], spent[side]))
    times = statistics.median(other / one for one, other in pairs)
    return f"{times:.3f} of {statistics.median(one for one, _ in pairs) * 1e3:.1f} ms"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    full, short = torch.float32, torch.bfloat16
    lines = [
        "# A layer's projections on a CPU: one function each, shared, folded",
        "",
        f"torch {torch.__version__}, one thread; `python {' '.join(sys.argv)}`. {TOKENS:,} tokens forward and "
        f"backward, r = {RANK}; CPU time as a part of one function each, beside that one's.",
        "",
        "| model | projections | shared, float32 | shared, bfloat16 | folded, bfloat16 weights, float32 products |",
        "|---|---|---|---|---|",
    ]
    foldings: list[float] = []
    for model, (hidden, intermediate, keys, runs) in SHAPES.items():
        groups = {
            "q, k, v": ([hidden, keys, keys], hidden),
            "o": ([hidden], hidden),
            "gate, up": ([intermediate] * 2, hidden),
            "down": ([hidden], intermediate),
        }
        for name, (widths, width) in groups.items():
            several = len(widths) > 1
            cells = [ratio(lora_linears, widths, width, d, d, runs) if several else "-" for d in (full, short)]
            cells.append(ratio(folded, widths, width, short, full, runs))
            foldings.append(float(cells[-1].split()[0]))
            lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Folding is worth a second path where every projection takes at most {WORTH_FOLDING:.2f} of its time: here "
        f"{min(foldings):.3f} to {max(foldings):.3f}, so it is {'to be' if max(foldings) <= WORTH_FOLDING else 'not'} "
        "taken. To write W + s B A moves 2 x in x out numbers where to add low Bᵀ to an output moves 2 x tokens x out.",
    ]
    path = Path(__file__).parent / "results" / "projections-cpu.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
