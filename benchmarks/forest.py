"""What it saves to compute a beginning that examples share once: one layer over a forest and over a plain pack.

    python benchmarks/forest.py                           # CPU, float32, one thread; some minutes
    python benchmarks/forest.py --dtype bfloat16 --repeats 3

The layer is one of SmolLM2-135M's (9 heads of 64 over 3, its weights frozen as under an adapter), forward and backward,
and its attention alone. `system`: a prompt of 1,500 tokens before 16 turns of 100. `tools`: groups of 16 rows of
examples/data/toolcalls_train.jsonl at random, in the tree of what they have in common. Both are measured in turn, in
seconds of the CPU (others on the machine take none of them), and the medians' ratio is what counts. `nothing`: rows
that share nothing, announced with parents and without. `n alike`: pairs of rows of 300 tokens of which the first n are
the same, for how long a beginning must be to be worth a segment. Writes benchmarks/results/forest-cpu-<dtype>.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from meter import machine

from lowrank.attention import positions_of, segments, set_attention
from lowrank.attention.segmentwise import attend_spans
from lowrank.attention.spans import from_lengths
from lowrank.attention.strips import Rule
from lowrank.models import load_tokenizer

HERE = Path(__file__).parent
ROWS = HERE.parent / "examples" / "data" / "toolcalls_train.jsonl"
LEAST = 16  # a shared stretch of fewer tokens is no segment of its own
GROUP, GROUPS = 16, 3
ALIKE = 4, 8, 16, 32, 64  # tokens


@dataclass(frozen=True)
class Pack:
    """Segments of one pack; `parents` None: none has one."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(HERE.parent / ".cache" / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    cases = {"system": [system()], "tools": tools(options.tokenizer), "nothing": [nothing()]}
    cases |= {f"{tokens} alike": [alike(tokens)] for tokens in ALIKE}
    title = f"# A layer over forests and over plain packs, {machine(torch.device('cpu'))}, {options.dtype}"
    lines = [
        f"{title}\n\n{platform.machine()}; torch {torch.__version__}, transformers {transformers.__version__}; "
        f"`python {' '.join(sys.argv)}`. Milliseconds of the CPU, medians of {options.repeats} in turn; `tokens` is "
        "how many the plain pack has for each of the forest's.\n",
        "| case | tokens | attention, plain | forest | times | layer, plain | forest | times |\n" + "|---" * 8 + "|",
    ]
    for name, pairs in cases.items():
        lines.append(row(name, pairs, dtype, options.repeats))
        print(lines[-1], flush=True)
    (HERE / "results" / f"forest-cpu-{options.dtype}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def system() -> tuple[Pack, Pack]:
    """16 turns of 100 tokens after one prompt of 1,500."""
    return Pack((1600,) * 16), Pack((1500, *(100,) * 16), (-1, *(0,) * 16))


def nothing() -> tuple[Pack, Pack]:
    """Rows of unlike lengths, which have nothing in common."""
    lengths = tuple(random.Random(0).randint(200, 400) for _ in range(GROUP))
    return Pack(lengths), Pack(lengths, (-1,) * GROUP)


def alike(tokens: int) -> tuple[Pack, Pack]:
    """Pairs of rows of 300 tokens, each of which begins with the same ones, where a segment costs the most."""
    pairs = GROUP // 2
    parents = tuple(parent for first in range(0, 3 * pairs, 3) for parent in (-1, first, first))
    return Pack((300,) * GROUP), Pack((tokens, 300 - tokens, 300 - tokens) * pairs, parents)


def tools(tokenizer: str) -> list[tuple[Pack, Pack]]:
    """Groups of tool-call rows at random."""
    chats = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
    known = load_tokenizer(tokenizer)
    found = []
    for number in range(GROUPS):
        texts = [known.apply_chat_template(chat, tokenize=False) for chat in random.Random(number).sample(chats, GROUP)]
        rows = [known(text, add_special_tokens=False)["input_ids"] for text in texts]
        lengths, parents = [], []
        _grow(sorted(rows), 0, -1, lengths, parents)
        found.append((Pack(tuple(map(len, rows))), Pack(tuple(lengths), tuple(parents))))
    return found


def _grow(rows: Sequence[list[int]], begin: int, parent: int, lengths: list[int], parents: list[int]) -> None:
    """Add the tree of sorted rows, alike up to `begin`, to the segments."""
    while rows:
        family, shared = 1, len(rows[0])
        while family < len(rows) and (common := min(shared, _alike(rows[0], rows[family]))) - begin >= LEAST:
            family, shared = family + 1, common
        lengths.append(shared - begin)
        parents.append(parent)
        if family > 1:
            _grow(rows[:family], shared, len(lengths) - 1, lengths, parents)
        rows = rows[family:]


def _alike(one: list[int], other: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def row(name: str, pairs: list[tuple[Pack, Pack]], dtype: torch.dtype, repeats: int) -> str:
    """A line of the table: sums over the pairs of packs."""
    tokens = [sum(sum(pair[side].lengths) for pair in pairs) for side in (0, 1)]
    cells = [name, f"{tokens[0] / tokens[1]:.2f}"]
    for step_of in (attention, layer):
        sums = [0.0, 0.0]
        for pair in pairs:
            for side, seconds in enumerate(in_turn([step_of(pack, dtype) for pack in pair], repeats)):
                sums[side] += seconds
        cells += [f"{sums[0] * 1e3:.0f}", f"{sums[1] * 1e3:.0f}", f"{sums[0] / sums[1]:.2f}"]
    return f"| {' | '.join(cells)} |"


def in_turn(steps: list[Callable[[], None]], repeats: int) -> list[float]:
    """Median seconds of the CPU of each step, after one to warm up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for step, taken in zip(steps, seconds, strict=True):
            began = time.process_time()
            step()
            taken.append(time.process_time() - began)
    return [statistics.median(taken[1:]) for taken in seconds]


def attention(pack: Pack, dtype: torch.dtype) -> Callable[[], None]:
    """The attention of a layer alone."""
    spans, rule = from_lengths(pack.lengths, None, pack.parents), Rule(0.125, None, None)
    q, k, v = (torch.randn(spans.length, heads, 64, dtype=dtype, requires_grad=True) for heads in (9, 3, 3))
    grad = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(attend_spans(q, k, v, None, spans, rule), (q, k, v), grad)

    return step


def layer(pack: Pack, dtype: torch.dtype) -> Callable[[], None]:
    """A model of one layer without a head, its weights frozen."""
    config = transformers.LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=1,
        vocab_size=64,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config, dtype=dtype).requires_grad_(False)
    set_attention(model, "segments")
    positions = torch.tensor([positions_of(pack.lengths, pack.parents)])
    x = torch.randn(1, sum(pack.lengths), 576, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        with segments(model, pack.lengths, pack.parents):
            out = model(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
            torch.autograd.grad(out, x, grad)

    return step


if __name__ == "__main__":
    main()
