"""What of an adapter can carry each tensor in which two models differ: factors, a bias, or a whole copy of a module."""

from __future__ import annotations

import copy
import inspect
import re
import zlib
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from lowrank.adapters.kinds.kind import Kind
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.methods.layer import merge_obstacle
from lowrank.adapters.methods.lora import LORA_A, LORA_B
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.targeting.parameters import parameter_names
from lowrank.adapters.targeting.uncalled import Calls
from lowrank.errors import InputError
from lowrank.weights.arithmetic.approximate import leading
from lowrank.weights.arithmetic.extract_experts import ExpertMatrices, differing_experts, experts_in_file, is_stack
from lowrank.weights.arithmetic.factors import Product
from lowrank.weights.arithmetic.pairs import Pair
from lowrank.weights.files.adapter_file import shorten

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called


class Carriers:
    """The parts of an adapter, found by comparing two models tensor by tensor.

    Attributes:
        tensors: Of the adapter's file, by peft's names without the prefix.
        ranks: Path of a module, or of a stack of experts, with factors -> rank.
        energies: The same paths -> the part of ‖ΔW‖² that the factors keep, and ‖ΔW‖².
        stacks: The stacks of experts among them.
        whole: The modules that are saved whole.
        biases: The modules with factors whose bias differs.
        differing: Every parameter that differs.
        resized: Those with a row for each token, where the tuned model has another number of tokens.
    """

    def __init__(self, pair: Pair, r: int | None, energy: float | None, dtype: torch.dtype) -> None:
        self.pair, self.r, self.energy, self.dtype = pair, r, energy, dtype
        self.modules: dict[str, nn.Module] = dict(pair.base.skeleton.named_modules())
        self.calls = Calls(pair.base.skeleton)
        self.tensors: dict[str, torch.Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.energies: dict[str, tuple[float, float]] = {}
        self.whole: list[str] = []
        self.biases: set[str] = set()
        self.differing: list[str] = []
        self.resized: list[str] = []
        self._products: dict[str, Product] = {}
        self._experts: dict[str, dict[str, ExpertMatrices]] = defaultdict(dict)

    @property
    def stacks(self) -> list[str]:
        """The parameters that hold several experts' matrices and differ."""
        return [f"{path}.{name}" for path, parameters in self._experts.items() for name in parameters]

    @property
    def kept(self) -> dict[str, float]:
        """The share of each path's ‖ΔW‖² that its factors keep."""
        return {path: kept / size for path, (kept, size) in self.energies.items()}

    @property
    def kept_of_all(self) -> float:
        """The share of all of them together; 1 where nothing has factors."""
        whole = sum(size for _, size in self.energies.values())
        return sum(kept for kept, _ in self.energies.values()) / whole if whole else 1.0

    def compare(self, progress: Callable[[int, int], None] | None) -> None:
        """Fills everything.

        Raises:
            InputError: The models differ in shape, in something that no adapter holds, or not at all.
        """
        self._check_shapes()
        for done, name in enumerate(self.pair.names, start=1):
            if not self._in_whole(name):
                self._compare(name)
            if progress is not None:
                progress(done, len(self.pair.names))
        if not self.differing:
            raise InputError(f"the models {self.pair.base.folder} and {self.pair.tuned.folder} do not differ")
        self._part_biases_from_stacks()
        self._save_wholes()
        for path, parameters in self._experts.items():
            self.tensors |= experts_in_file(self.modules[path], path, parameters, self.dtype)
        for path, product in (self._products or {self._any_module(): None}).items():
            self._put(path, product)
        self._add_biases()

    def _check_shapes(self) -> None:
        wrong = []
        rows = [model.config.get_text_config() for model in (self.pair.base, self.pair.tuned)]
        vocabularies = tuple(getattr(config, "vocab_size", None) for config in rows)
        for name in self.pair.names:
            one, other = self.pair.shapes(name)
            if one != other:
                if one[1:] == other[1:] and (one[0], other[0]) == vocabularies:
                    self.resized.append(name)
                else:
                    wrong.append(f"{name} {list(one)} and {list(other)}")
        if wrong:
            raise InputError(f"the models differ in shape: {shorten(wrong)}", where=str(self.pair.tuned.folder))

    def _compare(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        if name in self.resized:
            if not self._lent(name):
                self.differing.append(name)
                self._carry_whole(name)
        elif is_stack(self.modules[path], leaf, self.pair.shapes(name)[0]):
            matrices = differing_experts(self.pair, name, self.r, self.energy)
            if matrices is not None:
                self.differing.append(name)
                self._experts[path][leaf] = matrices
                self.ranks[name], self.energies[name] = matrices.rank, matrices.energy
        elif (difference := self._difference(name)) is not None and not self._lent(name):
            self.differing.append(name)
            kind = self._fitting(path)
            if kind is not None and leaf == "weight":
                self._factorise(name, path, kind, difference)
            elif kind is not None and leaf == "bias":
                self.biases.add(path)
            else:
                self._carry_whole(name)

    def _difference(self, name: str) -> torch.Tensor | None:
        """After less before, None where they are the same."""
        one, other = self.pair.places(name)
        unread = self.pair.before.obstacle(one or name) or self.pair.after.obstacle(other or name)
        if unread and self.pair.same_bytes(name):
            return None
        before, after = self.pair.read(name)
        return None if torch.equal(before, after) else after - before

    def _fitting(self, path: str) -> Kind | None:
        """The module's kind, where factors on it act: it is called, and its matrix is one product."""
        module = self.modules[path]
        apart = merge_obstacle(module) is not None or self.calls.fault(path) is not None
        return None if apart else kind_of(module)

    def _lent(self, name: str) -> bool:
        """Whether the parameter is there for others alone, to which it is tied: factors on those carry what differs."""
        path, _, leaf = name.rpartition(".")
        others = [other for other in self.pair.tied_with(name) if self._fitting(other.rpartition(".")[0])]
        if not others:
            return False
        if self.calls.fault(path) is not None:
            return self.calls.stand_in(path) is not None
        module: nn.Module = self.modules[path]
        alone = kind_of(module) is None and leaf in module._parameters
        return alone and not re.search(rf"self\.{leaf}\b", inspect.getsource(type(module).forward))

    def _factorise(self, name: str, path: str, kind: Kind, difference: torch.Tensor) -> None:
        twin = copy.copy(self.modules[path])
        twin._parameters = {**twin._parameters, "weight": nn.Parameter(difference, requires_grad=False)}
        matrix = kind.weight(twin).float().contiguous()
        tied = [other.rpartition(".")[0] for other in self.pair.tied_with(name)]
        if twin_path := next((other for other in tied if other in self._products), None):
            product, self.energies[path] = self._products[twin_path], self.energies[twin_path]
            if (product.B.shape[0], product.A.shape[1]) != tuple(matrix.shape):
                product = Product(product.B.T, product.A.T)  # a head is the embedding's table the other way round
        else:
            size = torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()
            product, kept = leading(matrix, self.r, self.energy, zlib.crc32(path.encode()))
            self.energies[path] = (kept * size, size)
        self._products[path], self.ranks[path] = product, product.rank

    def _carry_whole(self, name: str) -> None:
        """The smallest module around the parameter that is called, as a copy; what was found for its parts is dropped.

        Raises:
            InputError: That would be the model itself.
        """
        path = name.rpartition(".")[0]
        while isinstance(self.modules[path], _CONTAINERS) or (path and self.calls.fault_of_copy(path)):
            path = path.rpartition(".")[0]
        if path in ("", self.pair.base.skeleton.base_model_prefix):
            raise InputError(
                f"{name} differs, and neither factors nor modules_to_save can hold it",
                where=str(self.pair.tuned.folder),
            )
        self._add_whole(path)

    def _add_whole(self, path: str) -> None:
        inside = [*self.ranks, *self.biases, *self._experts, *self.whole]
        for other in [other for other in inside if f"{other}.".startswith(f"{path}.")]:
            for found in (self.ranks, self.energies, self._products, self._experts):
                found.pop(other, None)
            self.biases.discard(other)
            self.whole = [whole for whole in self.whole if whole != other]
        self.whole.append(path)
        for path_of_same_end in self.modules:  # modules_to_save matches ends, here and in peft
            if path_of_same_end != path and matches_end(path_of_same_end, path):
                self._add_whole(path_of_same_end)

    def _in_whole(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.whole)

    def _save_wholes(self) -> None:
        """Buffers too: loading wants them."""
        for path in self.whole:
            for leaf in self.modules[path].state_dict():
                self.tensors[f"{path}.{leaf}"] = self.pair.read_after(f"{path}.{leaf}")

    def _any_module(self) -> str:
        """Where nothing differs that takes factors: peft reads no adapter without any."""
        if self._experts:
            return ""
        for path in self.modules:
            if (kind := self._fitting(path)) and kind.linear and not self._in_whole(f"{path}."):
                return path
        raise InputError("no module is left that takes factors, and an adapter needs one")

    def _put(self, path: str, product: Product | None) -> None:
        """Writes factors; None stands for ΔW = 0."""
        if not path:
            return
        module, kind = self.modules[path], kind_of(self.modules[path])
        assert kind is not None
        if product is None:
            out, into = kind.shape(module)
            product = Product(torch.zeros(1, into), torch.zeros(out, 1))
        self.ranks[path] = product.rank
        for factor, values in ((LORA_A, product.A), (LORA_B, product.B)):
            suffix, shaped = kind.in_file(module, factor, values.contiguous())
            self.tensors[f"{path}.{suffix}"] = shaped.to(self.dtype)

    def _part_biases_from_stacks(self) -> None:
        """A file has no place for biases beside adapted stacks of experts that have biases of their own."""
        if any("bias" in name for path in self._experts for name in parameter_names(self.modules[path])):
            for path in sorted(self.biases):
                self._add_whole(path)

    def _add_biases(self) -> None:
        """An adapter holds the biases of all its modules or of none; where only a bias differs, ΔW is 0."""
        for path in sorted(self.biases - self.ranks.keys()):
            self._put(path, None)
        names = set(self.pair.names)
        for path in self.ranks if self.biases else ():
            if f"{path}.bias" in names:
                self.tensors[f"{path}.base_layer.bias"] = self.pair.read_after(f"{path}.bias")
