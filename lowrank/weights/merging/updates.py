"""What an adapter does to one parameter of the base, worked out for a block of rows at a time.

Values come from the adapter's file when a block needs them: a merge holds a module's factors, not the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.methods.method import Matrix, Method
from lowrank.adapters.registry import method_of
from lowrank.ops.low_rank import LowRank
from lowrank.ops.merged import merged_weight


class Update(Protocol):
    """A change of one parameter."""

    @property
    def splits(self) -> bool:
        """Whether a block of rows is enough to work on; False needs the whole parameter at once."""
        ...

    @property
    def stacked(self) -> bool:
        """Whether rows are counted through all experts' matrices, one below another; else through dimension 0."""
        ...

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The parameter's new shape where it changes or is new, else None."""
        ...

    @property
    def before_tie(self) -> Update | None:
        """The part of the update that a tied parameter shares; None where it keeps the base's values."""
        ...

    @property
    def low_rank(self) -> bool:
        """Whether it adds something to the base, of which rounding can lose a share."""
        ...

    @property
    def steps(self) -> tuple[Update, ...]:
        """The updates that it consists of, in their order; itself where it is one."""
        ...

    def of_expert(self, expert: int) -> Update:
        """The update of one matrix, where the parameter holds one for each expert."""
        ...

    def apply(self, block: torch.Tensor, first: int) -> None:
        """Changes `block` (rows, ...), the parameter's rows from `first` on, in place, in float32 or float64."""
        ...


class Whole:
    """What most updates have in common: one parameter, not one for each expert."""

    @property
    def steps(self: Any) -> tuple[Update, ...]:
        return (self,)

    @property
    def stacked(self) -> bool:
        return False

    def of_expert(self, expert: int) -> Update:
        raise AssertionError("an update of a whole parameter meets a file that holds one matrix for each expert")


class Loaded(NamedTuple):
    """A module's part of an adapter.

    Attributes:
        tensors: By bare name ("lora_A"), in float32, without a convolution's dimensions.
        term: What they stand for, without a gain.
    """

    tensors: dict[str, torch.Tensor]
    term: LowRank


@dataclass(frozen=True, slots=True)
class LowRankUpdate(Whole):
    """W' = gain · (W + s·B·A) for the weight of one module.

    Attributes:
        matrix: W.
        load: Reads the module's part of the file.
        transposed: The parameter is stored as Wᵀ (Conv1D, embeddings).
        times: What ΔW is multiplied with besides.
        tied: What is tied to the parameter stays so (`ensure_weight_tying`).
    """

    config: AdapterConfig
    matrix: Matrix
    load: Callable[[], Loaded]
    transposed: bool
    times: float = 1.0
    tied: bool = False
    shape: None = None
    low_rank: bool = True

    @property
    def before_tie(self) -> Update | None:
        """All of it or nothing."""
        return self if self.tied else None

    @property
    def method(self) -> Method:
        """What the factors are of."""
        return method_of(self.config)

    @property
    def splits(self) -> bool:
        """A gain is a norm over whole rows of W, which lie across the rows of a transposed parameter."""
        return not (self.transposed and self.method.has_gain)

    def apply(self, block: torch.Tensor, first: int) -> None:
        flat, here = block.flatten(1), slice(first, first + block.shape[0])
        weight, (tensors, term) = (flat.t() if self.transposed else flat), self.load()
        if not self.transposed:
            term = term.rows(here)
        elif self.splits:
            term = term.columns(here)
        if self.method.has_gain:
            rows = slice(None) if self.transposed else here
            of_rows = {factor.name for factor in self.method.factors if factor.side == "row"}
            tensors = {name: each[rows] if name in of_rows else each for name, each in tensors.items()}
            term = LowRank(term.A, term.B, term.scale, self.method.gain(tensors, weight, term))
        merged_weight(weight, term, out=weight)


@dataclass(frozen=True, slots=True)
class Shift(Whole):
    """Something added to a bias: what `lora_bias` trained, times the scale."""

    load: Callable[[], torch.Tensor]
    scale: float
    splits: bool = True
    shape: None = None
    before_tie: None = None
    low_rank: bool = True

    def apply(self, block: torch.Tensor, first: int) -> None:
        block += self.scale * self.load()[first : first + block.shape[0]]


@dataclass(frozen=True, slots=True)
class ExpertsUpdate:
    """Wₑ' = Wₑ + s·leftₑ·rightₑ for every expert of a parameter (experts, d1, d2), or for one of them.

    Attributes:
        load: Gives left (experts, d1, r) and right (experts, r, d2), float32.
        expert: The one whose matrix the blocks are rows of; None where they are rows of all experts' matrices.
    """

    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    scale: float
    expert: int | None = None
    splits: bool = True
    stacked: bool = True
    shape: None = None
    before_tie: None = None
    low_rank: bool = True

    @property
    def steps(self) -> tuple[Update, ...]:
        return (self,)

    def of_expert(self, expert: int) -> Update:
        return ExpertsUpdate(self.load, self.scale, expert)

    def apply(self, block: torch.Tensor, first: int) -> None:
        left, right = self.load()
        height, at = left.shape[1], 0
        while at < block.shape[0]:
            expert, row = divmod(first + at, height) if self.expert is None else (self.expert, first + at)
            rows = block[at : at + height - row]
            term = LowRank(right[expert], left[expert, row : row + rows.shape[0]], self.scale)
            merged_weight(rows, term, out=rows)
            at += rows.shape[0]


@dataclass(frozen=True, slots=True)
class Replacement(Whole):
    """The whole parameter, from the adapter's file.

    Attributes:
        rows: Gives the values of rows `first` to `last`.
        tied: It is the base's own embedding, resized: what was tied to it stays so. A copy trained apart is not.
    """

    rows: Callable[[int, int], torch.Tensor]
    shape: tuple[int, ...]
    tied: bool
    splits: bool = True
    low_rank: bool = False

    @property
    def before_tie(self) -> Update | None:
        """All of it or nothing."""
        return self if self.tied else None

    def apply(self, block: torch.Tensor, first: int) -> None:
        block.copy_(self.rows(first, first + block.shape[0]))


@dataclass(frozen=True, slots=True)
class Resized(Whole):
    """A table of tokens with more rows than the base has, or fewer; what was tied to it stays so.

    Attributes:
        stored: How many rows the base has.
        fill: Gives the values of a row that it has not: the mean of its own, from which `resize_token_embeddings`
            starts new tokens.
    """

    shape: tuple[int, ...]
    stored: int
    fill: Callable[[], torch.Tensor]
    splits: bool = True
    low_rank: bool = False

    @property
    def before_tie(self) -> Update:
        """All of it."""
        return self

    def apply(self, block: torch.Tensor, first: int) -> None:
        if first + block.shape[0] > self.stored:
            block[max(0, self.stored - first) :] = self.fill()


@dataclass(frozen=True, slots=True)
class RowReplacement(Whole):
    """Single rows of an embedding or a head.

    Attributes:
        rows: Their numbers.
        values: (rows, dim).
        tied: Whether what is tied to it follows, as it does to an input embedding.
    """

    rows: torch.Tensor
    values: torch.Tensor
    tied: bool = True
    splits: bool = True
    shape: None = None
    low_rank: bool = False

    @property
    def before_tie(self) -> Update | None:
        """All of it or nothing."""
        return self if self.tied else None

    def apply(self, block: torch.Tensor, first: int) -> None:
        inside = (self.rows >= first) & (self.rows < first + block.shape[0])
        block[self.rows[inside] - first] = self.values[inside].to(block.dtype)


@dataclass(frozen=True, slots=True)
class Then(Whole):
    """One update after another: an embedding that was resized and then adapted."""

    parts: tuple[Update, Update]
    low_rank: bool = field(default=True, init=False)

    @property
    def steps(self) -> tuple[Update, ...]:
        """The parts'."""
        return tuple(step for part in self.parts for step in part.steps)

    @property
    def splits(self) -> bool:
        """Whether each part does."""
        return all(part.splits for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape after the last part that changes it."""
        return next((part.shape for part in reversed(self.parts) if part.shape is not None), None)

    @property
    def before_tie(self) -> Update | None:
        """As far as each part is shared."""
        first, second = self.parts
        if first.before_tie is first and second.before_tie is second:
            return self
        return first.before_tie

    def apply(self, block: torch.Tensor, first: int) -> None:
        for part in self.parts:
            part.apply(block, first)
