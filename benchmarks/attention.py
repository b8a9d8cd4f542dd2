"""Time and peak memory of attention, forward and backward, under every backend that the machine can run.

    python benchmarks/attention.py                        # CPU, 512 ... 32768 tokens; eager stops where memory does
    python benchmarks/attention.py --device cuda
    python benchmarks/attention.py --packed-only          # the pack of 16 x 256 tokens alone; writes nothing

What is measured is what a layer pays: the mask that transformers builds for the backend, the attention function of the
backend on (1, heads, n, 64) queries, and its backward pass. Each point runs in a process of its own, so that its peak
is its own and that one which runs out of memory takes nobody along: on CPU it is refused more than `--memory` GiB, and
more than four fifths of what the machine has free. Writes a table (.md), the numbers (.json) and a plot (.png) to
benchmarks/results/, and says which bars are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from meter import available_bytes, exponent, extra_mebibytes, machine, status_bytes
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from lowrank.attention import BACKENDS, segments, set_attention
from lowrank.errors import InputError

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
PACK = [256] * 16
RESULTS = Path(__file__).parent / "results"
LINEAR = 1.1  # the highest exponent of memory that counts as linear
TIMES_EAGER = 4.0  # at 4096 tokens, in bfloat16 on CPU
TIMES_SDPA = 2.5  # on the pack, on CPU


@dataclass(frozen=True)
class Point:
    """One measurement; `seconds` and `mebibytes` are None where it did not run, and `note` says why."""

    backend: str
    length: int
    packed: bool
    seconds: float | None = None
    mebibytes: float | None = None
    note: str = ""


def main() -> None:
    args = _arguments()
    if args.point is not None:
        backend, length, packed = args.point.split(":")
        print(json.dumps(asdict(measure(backend, int(length), packed == "1", args))))
        return
    points = [] if args.packed_only else _series(args)
    packed = [_in_a_process(backend, sum(PACK), True, args) for backend in args.backends]
    table = _tables(points, packed, args)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"attention-{machine(torch.device(args.device)).replace(' ', '-').lower()}-{args.dtype}"
    if not args.packed_only:
        stem.with_suffix(".md").write_text(table)
        stem.with_suffix(".json").write_text(json.dumps([asdict(p) for p in points + packed], indent=1) + "\n")
        _plot(points, stem.with_suffix(".png"), f"{machine(torch.device(args.device))}, {args.dtype}")
        print(f"written: {stem}.md, .json, .png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--backends", nargs="+", default=[name for name in BACKENDS if name != "paged"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that one point may take on CPU")
    parser.add_argument("--packed-only", action="store_true", help="the pack of 16 x 256 tokens alone; writes nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device on this machine")
    return args


def _series(args: argparse.Namespace) -> list[Point]:
    points = []
    for backend in args.backends:
        for length in args.lengths:
            points.append(_in_a_process(backend, length, False, args))
            if points[-1].seconds is None:
                break
    return points


def _in_a_process(backend: str, length: int, packed: bool, args: argparse.Namespace) -> Point:
    """`measure` in a fresh process; a point that ran out of memory comes back without numbers."""
    options = [
        f"--{k.replace('_', '-')}={getattr(args, k)}"
        for k in ("device", "dtype", "heads", "key_heads", "repeats", "memory")
    ]
    command = [sys.executable, __file__, f"--point={backend}:{length}:{int(packed)}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        point = Point(**json.loads(done.stdout.splitlines()[-1]))
    else:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        out_of_memory = any(word in done.stderr for word in ("allocate memory", "out of memory", "MemoryError"))
        point = Point(backend, length, packed, note="out of memory" if out_of_memory or done.returncode < 0 else last)
    size = f"{point.mebibytes or math.nan:9.1f} MiB"
    print(f"{backend:9s}{length:7d} {point.seconds or math.nan:9.4f} s {size} {point.note}")
    return point


def measure(backend: str, length: int, packed: bool, args: argparse.Namespace) -> Point:
    """Best time of some steps, and the first one's peak of memory above what inputs and output's gradient take."""
    torch.manual_seed(0)
    if args.device == "cpu":
        limit = status_bytes("VmData") + min(int(args.memory * 2**30), available_bytes() * 4 // 5)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        _step(backend, [64, 64] if packed else [128], args)()
        step = _step(backend, PACK if packed else [length], args)
    except InputError as refused:
        return Point(backend, length, packed, note=refused.what)
    mebibytes = extra_mebibytes(step, torch.device(args.device))
    seconds = []
    while len(seconds) < args.repeats and sum(seconds) < 20:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return Point(backend, length, packed, min(seconds), mebibytes)


def _step(backend: str, lengths: list[int], args: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward pass over a pack of `lengths`."""
    device, dtype, n = torch.device(args.device), getattr(torch, args.dtype), sum(lengths)
    config = transformers.LlamaConfig(
        hidden_size=64 * args.heads,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_heads,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    set_attention(model, backend, packing=True)
    name = model.config._attn_implementation
    layer = next(module for module in model.modules() if isinstance(module, LlamaAttention))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    q, k, v = (
        torch.randn(1, n, heads, 64, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (args.heads, args.key_heads, args.key_heads)
    )
    grad = torch.randn(1, n, args.heads, 64, device=device, dtype=dtype)
    positions = torch.cat([torch.arange(part) for part in lengths])[None].to(device)
    mask_of = transformers.masking_utils.create_causal_mask

    def step() -> None:
        with segments(model, lengths):
            mask = mask_of(model.config, grad[:, :, 0], None, None, position_ids=positions)
            arguments = {} if "flash" not in name else {"position_ids": positions}
            out, _ = attend(layer, q, k, v, mask, scaling=layer.scaling, **arguments)
            out.backward(grad)
        q.grad = k.grad = v.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _growth(points: list[Point], of: Callable[[Point], float | None]) -> float:
    """The exponent over the longer half of what ran."""
    ran = [(p.length, value) for p in points if (value := of(p)) is not None]
    ran = ran[len(ran) // 2 - 1 :] if len(ran) > 3 else ran
    return exponent([length for length, _ in ran], [value for _, value in ran])


def _seconds(point: Point) -> float | None:
    return point.seconds


def _mebibytes(point: Point) -> float | None:
    return point.mebibytes


def _tables(points: list[Point], packed: list[Point], args: argparse.Namespace) -> str:
    by_name = {b: [p for p in points if p.backend == b] for b in args.backends}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, "
    title = f"# Attention on {machine(torch.device(args.device))}, {args.dtype}\n\n{versions}"
    lines = [
        title
        + f"{args.heads} heads of 64 over {args.key_heads}. Forward and backward, seconds / MiB above the inputs.\n"
    ]
    if points:
        lines += ["| tokens | " + " | ".join(args.backends) + " |", "|---" * (len(args.backends) + 1) + "|"]
        for length in args.lengths:
            cells = [next((_cell(p) for p in by_name[b] if p.length == length), "") for b in args.backends]
            lines.append(f"| {length} | " + " | ".join(cells) + " |")
        growth = [f"{_growth(by_name[b], _seconds):.2f} / {_growth(by_name[b], _mebibytes):.2f}" for b in args.backends]
        lines += ["| exponent | " + " | ".join(growth).replace("nan / nan", "") + " |", ""]
    lines += [
        "One pack of 16 segments of 256 tokens (sdpa: under a block mask):\n",
        "| backend | seconds | MiB | times sdpa |",
        "|---|---|---|---|",
    ]
    reference = _seconds_of(packed, "sdpa", sum(PACK))
    for p in packed:
        times = f"{reference / p.seconds:.2f}" if reference and p.seconds else ""
        lines.append(f"| {p.backend} | {_cell(p).replace(' / ', ' | ') if p.seconds else p.note + ' | '} | {times} |")
    return "\n".join([*lines, "", *_bars(by_name, packed, args)]) + "\n"


def _seconds_of(points: list[Point], backend: str, length: int) -> float | None:
    return next((p.seconds for p in points if (p.backend, p.length) == (backend, length)), None)


def _bars(by_name: dict[str, list[Point]], packed: list[Point], args: argparse.Namespace) -> list[str]:
    """What was promised for the CPU, as far as this run can say."""
    if args.device != "cpu" or args.dtype != "bfloat16":
        return []
    bars = []
    for backend in ("sdpa", "segments"):
        points = by_name.get(backend, [])
        growth, seconds = _growth(points, _mebibytes), _seconds_of(points, backend, 4096)
        eager = _seconds_of(by_name.get("eager", []), "eager", 4096)
        if not math.isnan(growth):
            bars.append(
                (f"{backend}: memory grows with an exponent of {growth:.2f}, at most {LINEAR}", growth <= LINEAR)
            )
        if seconds and eager:
            times = eager / seconds
            text = f"{backend}: {times:.1f} times eager's speed at 4096 tokens, at least {TIMES_EAGER}"
            bars.append((text, times >= TIMES_EAGER))
    ours, theirs = (_seconds_of(packed, backend, sum(PACK)) for backend in ("segments", "sdpa"))
    if ours and theirs:
        text = f"segments: {theirs / ours:.1f} times sdpa's speed on the pack, at least {TIMES_SDPA}"
        bars.append((text, theirs / ours >= TIMES_SDPA))
    return [f"- {text}: {'kept' if kept else 'MISSED'}" for text, kept in bars]


def _cell(point: Point) -> str:
    return point.note if point.seconds is None else f"{point.seconds:.4f} / {point.mebibytes:.1f}"


def _plot(points: list[Point], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, label, of in zip(
        axes, ("seconds", "MiB above the inputs"), (lambda p: p.seconds, lambda p: p.mebibytes), strict=True
    ):
        for backend in dict.fromkeys(p.backend for p in points):
            ran = [p for p in points if p.backend == backend and p.seconds is not None]
            if ran:
                axis.plot([p.length for p in ran], [of(p) for p in ran], marker="o", label=backend)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks(list(LENGTHS), [str(p) for p in LENGTHS], fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"attention, forward and backward: {title}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
