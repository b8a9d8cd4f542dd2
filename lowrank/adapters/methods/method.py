"""What a method is: the one place that knows what its config, its tensors and its files say.

A method thinks of one matrix W (out, in) of one module. A layer (`LowRankLayer`) holds the tensors, a `Kind` knows how
the module stores W and applies a term, and the files room how a folder is written; they ask the method for what is its
own. A method is stateless, one file, and one line in the registry.

A run's config is read before torch is loaded, so that a mistake is told at once; and it is made of the configs of
methods. So their files import no torch: what computes imports what it needs where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.factor import Factor
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
"""A module's tensors, and those that all modules share, by bare name and without a convolution's dimensions."""

Named: TypeAlias = "dict[str, torch.Tensor]"
"""An adapter's tensors by the names that files have for them."""

Holder: TypeAlias = Any
"""The `LowRankLayer` that holds a method's tensors for one module: each is an attribute of its bare name."""

Holders: TypeAlias = "Mapping[str, tuple[Any, Holder]]"
"""A model's layers of one adapter: path -> the module and its layer."""

Batches: TypeAlias = "Iterable[Mapping[str, torch.Tensor]]"
Originals: TypeAlias = "Callable[[str], torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Matrix:
    """The matrix of one module, as a method sees it.

    Attributes:
        path: The module's.
        out, into: W is (out, in).
        groups: Into how many groups a convolution cuts its channels.
        looked_up: Whether the input picks columns of W (an embedding).
        linear: Whether it is a linear layer's.
    """

    path: str
    out: int
    into: int
    groups: int = 1
    looked_up: bool = False
    linear: bool = True


@dataclass(frozen=True, slots=True)
class Outset:
    """What a method has worked out for a whole model before its layers are built.

    Attributes:
        config: The config to build with.
        outside: What the method was given for the layers' start besides the model.
    """

    config: Any
    outside: Any = None


class Method:
    """A method.

    Attributes:
        name: In a run's config (`adapter.method`) and in `METHODS`.
        summary: What it is, in a sentence.
        config: Its config's class.
        fixed: Fields that have one value where this method is named, because they are what names it in peft's words.
        peft_type: In `adapter_config.json`.
        factors: The tensors of each module, in the order in which a layer has them.
        shared: Names of tensors that all modules of an adapter have in common; files have them beside the model.
        neutral: Keys of peft's config that mean nothing at these values.
        unused: Keys of peft's config that this method has no use for.
        lacks: Fields that peft's config of this method has not; a file says without them what they meant.
        start_only: Keys that only the start of a run reads: neither written nor minded.
        set_by_run: Fields that a run fills in.
        of_base: Whether ΔW cannot be told from a module's tensors without knowing W's shape.
        has_gain: Whether rows of W + ΔW are multiplied with a gain (`gain`).
        spans_run: What it does over the whole of a run, which another number of steps would change ("" for nothing).
        in_transformers: Whether transformers' `load_adapter` makes the same model of its files.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    config: ClassVar[type[AdapterConfig]]
    fixed: ClassVar[Mapping[str, Any]] = {}
    peft_type: ClassVar[str]
    factors: ClassVar[tuple[Factor, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, Any]] = {}
    unused: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset()
    start_only: ClassVar[frozenset[str]] = frozenset()
    set_by_run: ClassVar[tuple[str, ...]] = ()
    of_base: ClassVar[bool] = False
    has_gain: ClassVar[bool] = False
    spans_run: ClassVar[str] = ""
    in_transformers: ClassVar[bool] = False

    @property
    def composes(self) -> bool:
        """Whether a module's tensors are a sum s · B · A that can be worked with apart from the base."""
        return not (self.of_base or self.has_gain)

    # What its numbers mean.

    def rank(self, config: Any, path: str) -> int:
        """The rank of the module at `path`."""
        raise NotImplementedError

    def scale(self, config: Any, path: str) -> float:
        """s of ΔW = s · B · A at `path`."""
        raise NotImplementedError

    def dropout(self, config: Any) -> float:
        """The probability that an input of the low-rank path is dropped in training."""
        raise NotImplementedError

    def shapes(self, config: Any, matrix: Matrix, r: int) -> dict[str, tuple[int, ...]]:
        """The shape of each factor at rank r, without a convolution's dimensions; the first's first dimension is r.

        Raises:
            InputError: the method does not fit such a module, or the rank does not.
        """
        raise NotImplementedError

    def low_rank(self, tensors: Tensors, scale: float, matrix: Matrix | None) -> LowRank:
        """The term that a module's tensors stand for.

        Args:
            tensors: By bare name.
            scale: As it acts now.
            matrix: W; None where it is not known, unless the method is `of_base`.
        """
        raise NotImplementedError

    def gain(self, tensors: Tensors, weight: torch.Tensor, term: LowRank) -> torch.Tensor:
        """Of a method that `has_gain`: what rows of W + ΔW are multiplied with.

        Args:
            tensors: The module's, those on the side "row" for these rows alone.
            weight: Whole rows of W (rows, in).
            term: ΔW of these rows.
        """
        raise NotImplementedError

    # What a finished file means, said once more for the proof of a merge: it shares nothing with the above.

    def product(self, config: Any, matrix: Matrix, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        """ΔW · x (out,), by the method's formula from the file's own tensors."""
        raise NotImplementedError

    def row_norms(self, tensors: Tensors) -> torch.Tensor:
        """Of a method that `has_gain`: the norm that each row of W' has, (out,)."""
        raise NotImplementedError

    # Its layers.

    def prepare(
        self,
        model: Any,
        config: Any,
        targets: Mapping[str, Any],
        batches: Batches | None,
        originals: Originals | None,
    ) -> Outset:
        """What is to be known of the whole model before the layers are built.

        Args:
            model: The base.
            config: As it was given.
            targets: The modules that get a layer, by path.
            batches, originals: What `wrap` was given for an initialisation.

        Raises:
            InputError: something is given that the config does not ask for, or the other way round.
        """
        for argument, given in (("batches", batches), ("originals", originals)):
            if given is not None:
                raise InputError(f"`{argument}` is for initialisations of LoRA, and the method is {self.name}")
        return Outset(config)

    def shared_for(self, config: Any, matrices: Iterable[Matrix]) -> Named:
        """The tensors that all modules share, by bare name, made anew for these matrices; files may leave them out."""
        return {}

    def start(self, layer: Holder, config: Any, module: Any, matrix: Matrix, outset: Outset) -> None:
        """Fills the parameters of a new layer as the config says."""
        raise NotImplementedError

    def term(self, layer: Holder, module: Any) -> LowRank:
        """The term that acts on the module's W now."""
        return self.low_rank(layer.tensors(), layer.scale, layer.matrix)

    def own_bias(self, layer: Holder) -> torch.Tensor | None:
        """What the layer adds to the module's bias, None for nothing."""
        return None

    def more_in_file(self, layer: Holder) -> dict[str, torch.Tensor]:
        """Tensors of a layer besides its factors, by the names that peft has for them after the module's path."""
        return {}

    def check_mergeable(self, path: str, layer: Holder, module: Any) -> None:
        """Raises InputError where the module has no place for what the layer stands for."""

    def forget(self, layer: Holder) -> None:
        """Drops what is kept of a layer's tensors, which have been moved or may begin to change."""

    # Its files.

    def fields_of(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The config's fields, from the keys of a file's config that are known.

        Raises:
            InputError: the adapter means something that its files do not say.
        """
        return dict(raw)

    def to_json(self, config: Any) -> dict[str, Any]:
        """The config's keys in `adapter_config.json`."""
        return config.model_dump(mode="json", exclude=set(self.start_only | self.lacks))

    def saves_shared(self, config: Any) -> bool:
        """Whether files hold the shared tensors; else whoever reads one makes them anew."""
        return True

    def taken_out(self, config: Any) -> str | None:
        """The initialisation after which factors stand for ΔW only together with what it took out of the base."""
        return None

    def portable(self, config: Any, tensors: Named, layers: Holders) -> tuple[Any, Named]:
        """The config and the tensors to save, of a live adapter: what any reader makes the same model of."""
        return config, tensors

    def scaled(self, config: Any, tensors: Named, factor: float) -> tuple[Any, Named]:
        """The same adapter, acting `factor` times as strongly."""
        raise NotImplementedError

    def as_lora(self, config: Any, tensors: Named, layers: Holders) -> tuple[Any, Named] | None:
        """Config and tensors of an ordinary LoRA that acts the same, of what `portable` gave; None if it is one."""
        return None

    def headline(self, config: Any) -> str:
        """The fields that say how strongly it acts, for `lowrank info`."""
        return f"bias {config.bias}"

    # Its run.

    def companion(self, config: Any, layers: Holders, total_step: int) -> Any:
        """What goes with a run of so many steps: a `penalty` of the loss, a `step` after each, a state; None for none.

        Its `config` is what the adapter's becomes.
        """
        return None
