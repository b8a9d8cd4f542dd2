"""What a training step would cost on an NVIDIA H100, counted without one: LoRA on all linear layers, packs.

    python benchmarks/card_cost.py
    python benchmarks/card_cost.py --model 1b --tokens 8192 --segment 1024

lowrank's own loop takes a step on the card that the tests pretend (`tests/card`), whose tensors are shapes alone. Every
operation takes the largest of three times: its multiplications by the card's rate, its bytes, each tensor read or
written once, by the memory's, and the least that a launch takes. One layer and two are counted, and the model's is
one + (layers - 1) x (two - one). The same step without the project's kernels stands beside. It is a count by stated
rates, no measurement: it knows no cache, no host that is late, no product of an awkward shape. Writes
benchmarks/results/card-cost-<model>.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import lowrank
from lowrank.data import Example, Examples, plan_batches
from lowrank.ops import cross_entropy, gated, rms_norm
from lowrank.ops.kernels import on_card as kernels
from lowrank.training.loop import fit
from lowrank.training.losses.supervised import HiddenLoss, LossOptions
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.settings import OptimizerSettings
from lowrank.training.run import Callback, Run
from lowrank.training.transforms import rotary
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.norms import lean_norms
from lowrank.training.transforms.shared_inputs import share_inputs

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "card")]
from pretended import CUDA, Card, on_card, whose_line  # noqa: E402  (the card of the tests)

RANK = 16
_RANKS = {RANK, 2 * RANK, 3 * RANK}  # of factors that are stacked
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0}
"""Products of two matrices, or of two stacks of them, and which argument is the first of both."""
_ATTENTION = {"torch_attn::_varlen_attn": (0, 1.0), "torch_attn::_varlen_attn_backward": (1, 2.5)}
"""Which argument is q, and multiplications as a part of the forward pass's."""


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int


MODELS = {
    "8b": Shape(128256, 4096, 14336, 32, 32, 8),
    "1b": Shape(128256, 2048, 8192, 16, 32, 8),
    "135m": Shape(49152, 576, 1536, 30, 9, 3),
}


@dataclass(frozen=True)
class Rates:
    """What a card is taken to reach.

    Attributes:
        flops: Of products in bfloat16, a second.
        bytes: To and from its memory, a second.
        launch: Seconds that the smallest operation takes.
        attention: What of `flops` attention's kernel reaches.
    """

    flops: float = 620e12
    bytes: float = 2.8e12
    launch: float = 2e-6
    attention: float = 0.5


@dataclass
class Cost:
    """Of operations of one kind."""

    launches: float = 0
    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.seconds + other.seconds, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.launches * times, self.seconds * times, self.flops * times)


@dataclass
class Count(Callback):
    """What the step that is being taken has cost so far, by kind; `last` is the one before."""

    card: Card
    shape: Shape
    rates: Rates
    segment: int
    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    last: dict[str, Cost] = field(default_factory=dict)
    _launches: int = 0

    def on_step_end(self, run: Run, metrics: Any) -> None:
        """The next step begins: the first one makes the optimiser's state, and is not what is asked for."""
        self.last, self.costs = self.costs, defaultdict(Cost)

    def operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Of torch, as the card tells of it; what launches nothing costs nothing."""
        if self.card.launches == self._launches:
            return
        self._launches = self.card.launches
        name = func._schema.name
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)] or read  # of a list, in place
        self._add(self._kind(name, read), self._flops(name, args), sum(map(size, read)) + sum(map(size, written)))

    def kernel(self, kind: str, tensors: list[torch.Tensor], again: int) -> None:
        """Of the project, which moves each of its tensors once, and the first one `again` so many times."""
        self._add(kind, 0.0, sum(map(size, tensors)) + again * size(tensors[0]))

    def _add(self, kind: str, flops: float, moved: float) -> None:
        rate = self.rates.flops * (self.rates.attention if kind == "attention" else 1.0)
        seconds = max(flops / rate, moved / self.rates.bytes, self.rates.launch)
        self.costs[kind] += Cost(1, seconds, flops)

    def _flops(self, name: str, args: Any) -> float:
        if name in _ATTENTION:
            place, part = _ATTENTION[name]
            tokens, heads, width = args[place].shape
            return 2.0 * tokens * self.segment * heads * width * part  # two products of its lower half
        if name not in _PRODUCTS:
            return 0.0
        one, other = args[_PRODUCTS[name] :][:2]
        return 2.0 * one.numel() * other.shape[-1]

    def _kind(self, name: str, read: list[torch.Tensor]) -> str:
        line, sizes = whose_line(), {length for x in read for length in x.shape}
        low = any(x.dim() == 2 and _RANKS & {*x.shape} for x in read)
        if line.endswith((" _step", " _clip")):
            return "optimiser"
        if name in _PRODUCTS:
            return "products, head" if self.shape.vocabulary in sizes else f"products, {'low-rank' if low else 'base'}"
        if name in _ATTENTION or "/attention/" in line:
            return "attention"
        if "cross_entropy" in line or self.shape.vocabulary in sizes:
            return "loss"
        if "rms_norm" in line:
            return "norms"
        if low:
            return "low-rank, elementwise"
        if self.shape.intermediate in sizes:
            return "gates"
        return "rotary" if any(x.dim() == 4 for x in read) or "rotary" in line else "rest"


def size(x: torch.Tensor) -> int:
    """Bytes; what is repeated by a stride of 0 lies in memory once."""
    found = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        found *= 1 if stride == 0 and length else length
    return found


class Launch:
    """Stands for a kernel, and counts what it is called with."""

    def __init__(self, count: Count, kind: str, again: int) -> None:
        self.count, self.kind, self.again = count, kind, again

    def __getitem__(self, grid: Any) -> Launch:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        """Launches."""
        self.count.kernel(self.kind, [x for x in args if isinstance(x, torch.Tensor)], self.again)


@contextmanager
def kernels_counted(count: Count) -> Iterator[None]:
    """The project's kernels are taken to run, and rotary positions to be Llama's."""
    with ExitStack() as patches:
        for module in (rms_norm, gated, cross_entropy, rotary):
            patches.enter_context(mock.patch.object(module, "kernels_take", _all_on_card))
        used = kernels.KernelChoice(True, "counted")
        patches.enter_context(mock.patch.object(rotary, "kernels_on", return_value=used))
        patches.enter_context(mock.patch.object(rotary, "_same", return_value=rotary._ROUNDINGS[0]))
        for module, name, kind, again in _kernels():
            assert hasattr(module, name)
            patches.enter_context(mock.patch.object(module, name, Launch(count, kind, again)))
        yield


def _kernels() -> list[tuple[ModuleType, str, str, int]]:
    """Where they stand, what they are counted as, and how often they take their first tensor again."""
    from lowrank.ops.kernels import gate_rows, loss_rows, norm_rows, rotation

    return [
        (norm_rows, "_norm", "norms", 0),
        (norm_rows, "_norm_slopes", "norms", 0),
        (gate_rows, "_gate", "gates", 0),
        (gate_rows, "_gate_slopes", "gates", 0),
        (rotation, "_rotate", "rotary", 0),
        (loss_rows, "_loss", "loss", 2),  # logits are read for their sums, read again, and their gradient written
    ]


def _all_on_card(*tensors: torch.Tensor) -> bool:
    return all(tensor.is_cuda for tensor in tensors)


def model_of(shape: Shape, layers: int) -> PreTrainedModel:
    """Of shapes alone, with lean norms: of what kind they are is found out on the CPU."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    for norm in norms:
        norm.to_empty(device="cpu")
    assert lean_norms(model) == len(norms)
    for norm in norms:
        norm.to(device="meta")
    return model


def step_cost(shape: Shape, layers: int, tokens: int, segment: int, rates: Rates, own: bool) -> dict[str, Cost]:
    """Of one step of one pack, by kind.

    Args:
        shape: Of the model.
        layers: How many of its layers are counted.
        tokens: Of the pack.
        segment: Tokens of each example in it.
        rates: Of the card.
        own: With the project's kernels.
    """
    model, card = model_of(shape, layers), Card(held_on="meta")
    count = Count(card, shape, rates, segment)
    with card, kernels_counted(count) if own else ExitStack():
        lowrank.wrap(on_card(model, "meta"), lowrank.LoraConfig(r=RANK, target_modules="all-linear"))
        rotary.fused_rotary(model, CUDA)
        keep_less(model)
        share_inputs(model)
        lowrank.set_attention(model, "auto", packing=True)
        examples = [Example(list(range(segment)), [False] + [True] * (segment - 1))] * (tokens // segment)
        plan = plan_batches(
            Examples.of(examples, "all"), packing=True, batch_size=1, max_tokens=tokens, pad_token_id=0, seed=0
        )
        optimizer = build_optimizer(model, OptimizerSettings(learning_rate=1e-4))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        run = Run(model, optimizer, schedule, scaler, Path(), 2, callbacks=[count])
        card.clear()
        card.hook = count.operation
        backward: Any = SimpleNamespace(backward=torch.Tensor.backward)
        fit(run, plan, HiddenLoss(model.get_output_embeddings(), LossOptions()), accelerator=backward)
    return count.last


def whole_cost(shape: Shape, tokens: int, segment: int, rates: Rates, own: bool) -> dict[str, Cost]:
    """Of a step of the whole model, by kind."""
    one, two = (step_cost(shape, layers, tokens, segment, rates, own) for layers in (1, 2))
    return {
        kind: one.get(kind, Cost()) + (cost + one.get(kind, Cost()) * -1) * (shape.layers - 1)
        for kind, cost in two.items()
    }


def table_of(own: dict[str, Cost], plain: dict[str, Cost], tokens: int) -> list[str]:
    """Lines of markdown, the dearest kind first."""
    total, plain_total = (sum(costs.values(), Cost()) for costs in (own, plain))
    lines = ["| kind | launches | ms | of the step | plain: launches | ms |", "|---|---|---|---|---|---|"]
    for kind in sorted({*own, *plain}, key=lambda kind: -plain.get(kind, Cost()).seconds):
        cost, beside = own.get(kind, Cost()), plain.get(kind, Cost())
        of = cost.seconds / total.seconds
        lines.append(
            f"| {kind} | {cost.launches:,.0f} | {cost.seconds * 1e3:.2f} | {of:.1%} | {beside.launches:,.0f} "
            f"| {beside.seconds * 1e3:.2f} |"
        )
    return [
        *lines,
        f"| all | {total.launches:,.0f} | {total.seconds * 1e3:.1f} | | {plain_total.launches:,.0f} "
        f"| {plain_total.seconds * 1e3:.1f} |",
        "",
        f"{tokens / total.seconds:,.0f} tokens a second with the kernels, {tokens / plain_total.seconds:,.0f} in plain "
        f"operations; products and attention multiply {total.flops / 1e12:,.0f} Tflop.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--segment", type=int, default=512, help="tokens of each example in the pack")
    parser.add_argument("--flops", type=float, default=Rates.flops, help="of bfloat16 products, a second")
    parser.add_argument("--bytes", type=float, default=Rates.bytes, help="of memory, a second")
    parser.add_argument("--launch", type=float, default=Rates.launch, help="seconds, of the smallest operation")
    parser.add_argument("--attention", type=float, default=Rates.attention, help="what of --flops attention reaches")
    options = parser.parse_args()
    shape, rates = MODELS[options.model], Rates(options.flops, options.bytes, options.launch, options.attention)
    own, plain = (whole_cost(shape, options.tokens, options.segment, rates, own) for own in (True, False))
    lines = [
        f"# A LoRA step of a Llama of {options.model.upper()} on a card, counted",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}; `python {' '.join(sys.argv)}`. No card "
        f"has run it. {options.tokens:,} tokens in segments of {options.segment}, r = {RANK} on all linear layers, "
        "bfloat16, nothing recomputed.",
        "",
        f"Taken for given: {rates.flops / 1e12:,.0f} TFLOP/s of products, of which attention reaches "
        f"{rates.attention:.0%}; {rates.bytes / 1e12:.1f} TB/s, each tensor of an operation moved once (logits three "
        f"times by the loss's kernel); {rates.launch * 1e6:.0f} µs at least for a launch, and a host never late.",
        "",
        *table_of(own, plain, options.tokens),
        "",
    ]
    path = ROOT / "benchmarks" / "results" / f"card-cost-{options.model}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
