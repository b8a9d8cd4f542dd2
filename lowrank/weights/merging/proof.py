"""A merge tried while it is made: every changed tensor on a random vector, against base and adapter.

The vector x is of signs, so that E‖Mx‖² = ‖M‖² for any matrix M: an error anywhere in W' shows in W'x. What W'x has to
be is worked out without W': from Wx and the factors' own products with x, and with the scale taken from the config and
the tensors. Sums are compared in float32 (or float64) row by row, so that the tolerance is that of the sums and not of
the weights' dtype. The rounding to that dtype is tried by itself, on one block of rows in sixteen, and these are read
back from the file under their name. All this is done with a block of rows while it is in a core's cache.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.adapters.tying import tied_group
from lowrank.errors import JobError
from lowrank.ops.precision import precise
from lowrank.storage.tensorfile import TensorFile, open_tensors, read_bytes
from lowrank.weights.files.adapter_file import AdapterFile, shorten
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.merging.buffers import BUFFERS
from lowrank.weights.merging.merge_choices import Rounding
from lowrank.weights.merging.merge_plan import Planned
from lowrank.weights.merging.promises import Promise, magnitudes, promised, thin
from lowrank.weights.merging.updates import LowRankUpdate, Update

_PERIOD = 65_521  # signs; longer vectors repeat them
_COMPARED = 1 << 16  # bytes of a block that is held against the base's file
_KEPT = 32  # parameters' products; threads are at a few of them at a time
_DEVIATIONS = 7  # of a sum of independent roundings: one row in 10¹⁰ is farther off by chance


@dataclass(frozen=True, slots=True)
class Proof:
    """What was tried.

    Attributes:
        tensors: How many changed tensors.
    """

    tensors: int


class Trial:
    """The trial of one merge; blocks come from several threads.

    Raises:
        JobError: From any method: a tensor is not what base and adapter make of it.
    """

    def __init__(
        self, base: ModelFolder, adapter: AdapterFile, updates: Mapping[str, Update], rounding: Rounding
    ) -> None:
        self.base, self.adapter, self.updates, self.rounding = base, adapter, updates, rounding
        self._files = {name: file for file in base.files.values() for name in file.entries}
        self._lock = threading.Lock()
        self._products: dict[tuple[int, int, torch.dtype], torch.Tensor | None] = {}
        generator = torch.Generator().manual_seed(0)
        self._signs = torch.randint(0, 2, (_PERIOD,), generator=generator).mul_(2).sub_(1).float().repeat(2)
        self._written: dict[str, torch.Tensor] = {}
        self._covered: dict[str, int] = defaultdict(int)
        self._tensors = 0

    def before(
        self, name: str, update: Update, block: torch.Tensor, first: int
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """Looks at rows of the base from `first` on; what it returns judges the same rows after the update.

        The judge returns the rows' products with the signs, where it has them.
        """
        transposed = isinstance(update, LowRankUpdate) and update.transposed
        weight = _matrix(block, transposed)
        start, columns = (first if transposed else 0), weight.shape[1]
        vectors = [self.signs(columns, start + other).to(weight.dtype) for other in range(1 + _has_gain(update))]
        hopes = [
            promised(update, weight, x, first, None if transposed else self._thin(update, x, other))
            for other, x in enumerate(vectors)
        ]
        with self._lock:
            self._covered[name] += block.numel()

        def judge(after: torch.Tensor) -> torch.Tensor | None:
            merged = _matrix(after, transposed)
            got = [merged @ x for x in vectors]
            if isinstance(update, LowRankUpdate) and update.method.has_gain:
                good = _has_norms(merged, got, hopes, magnitudes(update, first, len(merged)))
            else:
                unit = torch.finfo(merged.dtype).eps * (16 + 2 * columns**0.5)
                good = _within(got[0] - hopes[0].products, unit, got[0], merged, hopes[0].terms)
            if not good:
                raise _wrong(name, "its product with a random vector is not that of base and adapter")
            return None if transposed else got[0]

        return judge

    def rounded(
        self,
        planned: Planned,
        exact: torch.Tensor,
        written: torch.Tensor,
        first: int,
        products: torch.Tensor | None,
        scratch: torch.Tensor,
    ) -> None:
        """Rows as they were summed and as they are written; remembers what the file has to hold.

        Args:
            planned: The tensor.
            exact: The sums.
            written: What is written.
            first: The first of the rows.
            products: Of the sums with the signs, where they are known.
            scratch: Room for `written` in the sums' dtype.
        """
        sums, values = _matrix(exact, False), _matrix(written, False)
        x, info = self.signs(sums.shape[1]).to(sums.dtype), torch.finfo(values.dtype)
        unit = info.eps * (1.0 if self.rounding == "stochastic" else 0.5) + 16 * torch.finfo(sums.dtype).eps
        smallest = info.smallest_normal * info.eps * sums.shape[1] ** 0.5
        hoped = sums @ x if products is None else products
        got = _matrix(scratch.copy_(written), False) @ x
        least = smallest / unit
        if not _within(got - hoped, _DEVIATIONS * unit, hoped, sums, lambda: torch.full_like(hoped, least)):
            raise _wrong(planned.name, f"rounding to {planned.dtype} does not explain what is written")
        with self._lock:
            if planned.name not in self._written:
                self._written[planned.name] = torch.empty(_row_count(planned), dtype=torch.float64)
                self._tensors += bool(planned.changes) or planned.decoder is not None
        self._written[planned.name][first : first + len(got)] = got

    def source(self, planned: Planned, raw: torch.Tensor, first: int) -> None:
        """Rows of the base as they were read, against those that its files hold under the tensor's name."""
        file = self._files.get(planned.name)
        if file is None or planned.source is None or planned.decoder is not None:
            return
        entry = file.entries[planned.name]
        row = entry.size // max(1, entry.shape[0] * planned.height) if entry.shape else entry.size
        last = min(first + min(len(raw), -(-_COMPARED // max(1, row))), entry.size // max(1, row))
        own = _read(file, planned.name, first * row, last * row)
        if not _same_bytes(own, raw[: last - first].reshape(-1)):
            raise _wrong(planned.name, "it was made from another tensor of the base")

    def file(self, path: Path, sampled: int, rows_of: Callable[[Planned], int], tensors: list[Planned]) -> None:
        """Reads some blocks of each changed tensor of a finished file back, by the file's own header."""
        file = open_tensors(path)
        for planned in tensors:
            if planned.copied:
                continue
            entry, products = file.entries[planned.name], self._written.pop(planned.name, None)
            if products is None:
                raise _wrong(planned.name, "it was not tried")
            step = rows_of(planned)
            row = entry.size // max(1, len(products))
            starts = {*range(0, len(products), step * sampled), (len(products) - 1) // step * step}
            for first in sorted(starts):
                last = min(first + step, len(products))
                data = _read(file, planned.name, first * row, last * row).view(last - first, -1)
                dtype = precise(data.dtype)
                values = BUFFERS.take("values", data.numel(), dtype).view(data.shape).copy_(data)
                hoped = products[first:last].to(values.dtype)
                got = values @ self.signs(values.shape[1]).to(values.dtype)
                if not _within(got - hoped, 1e-5, hoped, values, hoped.abs):
                    raise _wrong(planned.name, f"{path.name} holds something else under that name")

    def finish(self) -> Proof:
        """Whether every part of every parameter that the adapter changes was met."""
        factors = {found.path for name in self.adapter.tensors if (found := factor_of(name))}
        if (group := tied_group(self.base.skeleton, self.adapter.config)) is not None and group[0] in factors:
            factors -= set(group[1])  # the same values once more
        sums = [step for update in self.updates.values() for step in update.steps if step.low_rank]
        if len(sums) < len(factors):
            raise JobError(f"the adapter has factors for {len(factors)} places, and {len(sums)} were merged")
        parameters = {name: tensor.numel() for name, tensor in self.base.skeleton.state_dict().items()}
        missed = [name for name in self.updates if not self._met(name, parameters)]
        if missed:
            raise JobError(f"the merge left out {shorten(missed)}; nothing is kept")
        return Proof(self._tensors)

    def signs(self, count: int, start: int = 0) -> torch.Tensor:
        """`count` random signs, from a place on: always the same ones."""
        at = start % _PERIOD
        return (
            self._signs[at : at + count]
            if at + count <= len(self._signs)
            else self._signs.repeat(-(-(at + count) // len(self._signs)))[at : at + count]
        )

    def _met(self, name: str, parameters: Mapping[str, int]) -> bool:
        source = self.base.untied(name)
        ties = self.base.skeleton.all_tied_weights_keys
        same = {name, source, *(key for key in ties if self.base.untied(key) == source)}
        entry = self._files[name].entries[name] if name in self._files else None
        shape = self.updates[name].shape
        least = torch.Size(shape or (entry.shape if entry else ())).numel()
        return any(self._covered[other] >= (least if shape else parameters.get(other, least)) for other in same)

    def _thin(self, update: Update, x: torch.Tensor, other: int) -> torch.Tensor | None:
        """What does not depend on the rows is worked out once for each parameter."""
        key = (id(update), other, x.dtype)
        if key in self._products:
            return self._products[key]
        found = thin(update, x)
        with self._lock:
            self._products[key] = found
            while len(self._products) > _KEPT:
                del self._products[next(iter(self._products))]
        return found


def _matrix(block: torch.Tensor, transposed: bool) -> torch.Tensor:
    flat = block.flatten(1) if block.dim() > 1 else block.reshape(-1, 1)
    return flat.t() if transposed else flat


def _has_gain(update: Update) -> bool:
    return isinstance(update, LowRankUpdate) and update.method.has_gain


def _within(
    off: torch.Tensor, unit: float, product: torch.Tensor, rows: torch.Tensor, more: Callable[[], torch.Tensor]
) -> bool:
    """Whether no row is farther off than `unit` times its size: that of its own and the rows' mean product, or, where
    that is too small, its norm and what `more` gives, which cost a pass over it."""
    usual = torch.linalg.vector_norm(product, 1).item() / max(1, len(product))
    if torch.linalg.vector_norm(off, torch.inf).item() <= usual * unit < torch.inf:
        return True  # stricter than what follows, and all that most blocks need
    off = off.abs_()
    near = off <= (product.abs() + usual) * unit
    far = ~near
    sizes = product[far].abs() + torch.linalg.vector_norm(rows[far], dim=1) + more()[far]
    return bool((off[far] <= unit * sizes + 1e-30).all())


def _has_norms(merged: torch.Tensor, got: list[torch.Tensor], hopes: list[Promise], wanted: torch.Tensor) -> bool:
    """Whether each row of W' is a multiple of its row of W + ΔW, of the norm (and with the sign) that it shall have.

    It is a multiple where it is the same one for both vectors. A row of zeros stays one.
    """
    norms, wanted = torch.linalg.vector_norm(merged, dim=1), wanted.to(merged.dtype)
    one, other = (hope.products for hope in hopes)
    unit = 64 * torch.finfo(torch.float32).eps  # in which the norm of W + ΔW was taken
    sums = torch.finfo(merged.dtype).eps * (16 + 2 * merged.shape[1] ** 0.5)
    nothing = (one == 0) & (other == 0)
    # W + ΔW is W' over a gain, and at most that much larger or smaller
    gain = (got[0].abs() + got[1].abs()) / (one.abs() + other.abs()).clamp_min(1e-30)
    before = norms / gain.clamp_min(1e-30) + hopes[0].terms()
    slack = sums * (norms * (one.abs() + other.abs()) + before * (got[0].abs() + got[1].abs()))
    parallel = (got[0] * other - got[1] * one).abs() <= slack + 1e-30
    sized = (norms - wanted.abs()).abs() <= unit * (norms + wanted.abs()) + 1e-30
    same_side = got[0] * one * wanted >= -sums * norms * (one.abs() + before) * wanted.abs()
    return bool((nothing | (parallel & sized & same_side)).all())


def _read(file: TensorFile, name: str, first: int, last: int) -> torch.Tensor:
    buffer = BUFFERS.take("read back", last - first, torch.uint8)
    with file.path.open("rb", buffering=0) as opened:
        read_bytes(opened.fileno(), file.entries[name].start + first, buffer)
    return buffer.view(file.entries[name].torch_dtype)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    wide = torch.int64 if one.nbytes % 8 == 0 and one.storage_offset() == other.storage_offset() == 0 else torch.uint8
    return torch.equal(one.view(wide), other.view(wide))


def _row_count(planned: Planned) -> int:
    return planned.rows[0] if planned.rows else 1


def _wrong(name: str, why: str) -> JobError:
    return JobError(f"the merged {name} failed its check: {why}; nothing is kept")
