"""A LoRA from the difference of two checkpoints, one module at a time."""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.kinds import kind_of
from lowrank.adapters.method import merge_obstacle
from lowrank.errors import InputError
from lowrank.weights.adapterfile import CONFIG_NAME, shorten
from lowrank.weights.approximate import leading
from lowrank.weights.basemodel import BaseModel, open_base
from lowrank.weights.decoding import decode_stored
from lowrank.weights.extract_experts import ExpertMatrices, differing_experts, experts_in_file
from lowrank.weights.factors import Product
from lowrank.weights.fingerprint import Fingerprint
from lowrank.weights.folders import refuse_inside
from lowrank.weights.stored import Stored
from lowrank.weights.targetnames import target_names
from lowrank.weights.writing import write_adapter


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was found.

    Attributes:
        out: The adapter's folder.
        ranks: Module path -> rank; modules that do not differ are not in it.
        kept: Module path -> the share of ‖W_tuned - W_base‖² that its factors keep.
        kept_of_all: The same over all modules together.
        whole: Modules saved whole, because what differs in them is no matrix (norms, biases).
        seconds: Time that it took.
    """

    out: Path
    ranks: dict[str, int]
    kept: dict[str, float]
    kept_of_all: float
    whole: list[str] = field(default_factory=list)
    seconds: float = 0.0


def extract(
    base: str | Path,
    tuned: str | Path,
    r: int | None = None,
    *,
    out: str | Path,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Writes the difference of two models of one architecture as a LoRA; base and adapter then answer like `tuned`.

    Linear layers, embeddings and convolutions get factors; other modules that differ are saved whole.

    Args:
        base: A model folder or a hub's name.
        tuned: The same model, trained further.
        r: The rank of every module; with `energy`, the largest rank.
        out: The adapter's folder.
        energy: The share of each module's ‖ΔW‖² to keep, with as few ranks as that takes.
        dtype: Of the tensors in the adapter's file.
        trust_remote_code: Whether the models may run their own code.
        progress: Called with the modules done and the modules in all.

    Raises:
        InputError: The models cannot be read, differ in shape, or do not differ at all.
    """
    if r is None and energy is None:
        raise InputError("Neither a rank nor an energy is given.")
    if r is not None and r < 1:
        raise InputError(f"The rank is {r}; it is at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"The energy is {energy}; it is above 0 and at most 1.")
    started = time.monotonic()
    models = [open_base(name, trust_remote_code=trust_remote_code) for name in (base, tuned)]
    for model in models:
        refuse_inside(Path(out), model.folder)
    if (Path(out) / CONFIG_NAME).exists():
        raise InputError("The folder already holds an adapter.", where=str(out), fix="Choose another folder.")
    work = _Extraction(models[0], models[1], r, energy, dtype)
    work.run(progress)
    work.write(Path(out), str(base))
    return ExtractReport(
        out=Path(out),
        ranks=work.ranks,
        kept={path: kept / size for path, (kept, size) in work.energies.items()},
        kept_of_all=sum(kept for kept, _ in work.energies.values()) / sum(size for _, size in work.energies.values())
        if work.energies
        else 1.0,
        whole=work.whole,
        seconds=time.monotonic() - started,
    )


class _Extraction:
    def __init__(
        self, base: BaseModel, tuned: BaseModel, r: int | None, energy: float | None, dtype: torch.dtype
    ) -> None:
        self.base, self.tuned, self.r, self.energy, self.dtype = base, tuned, r, energy, dtype
        self.before, self.after = Stored(base), Stored(tuned)
        self.modules = dict(base.skeleton.named_modules())
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.energies: dict[str, tuple[float, float]] = {}
        self.whole: list[str] = []
        self.biases: set[str] = set()
        self.experts: dict[str, dict[str, ExpertMatrices]] = defaultdict(dict)
        self._check()

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        names = self.before.names
        for done, name in enumerate(names, start=1):
            self._compare(name)
            if progress is not None:
                progress(done, len(names))
        self._add_biases()
        for path, parameters in self.experts.items():
            self.tensors |= experts_in_file(self.modules[path], path, parameters, self.dtype)
        if not self.tensors:
            raise InputError(f"The models {self.base.folder} and {self.tuned.folder} do not differ.")

    def write(self, out: Path, base: str) -> None:
        ranks = list(self.ranks.values())
        common = max(ranks, key=ranks.count) if ranks else 1
        others = {path: rank for path, rank in self.ranks.items() if rank != common}
        fused = [f"{path}.{name}" for path, parameters in self.experts.items() for name in parameters]
        config = LoraConfig(
            r=common,
            lora_alpha=common,
            target_modules=target_names(self.base.skeleton, [path for path in self.ranks if path not in fused]),
            target_parameters=fused or None,
            modules_to_save=self.whole or None,
            bias="lora_only" if self.biases else "none",
            rank_pattern=others,
            alpha_pattern={path: float(rank) for path, rank in others.items()},
            task_type="CAUSAL_LM" if type(self.base.skeleton).__name__.endswith("ForCausalLM") else None,
        )
        fingerprint = Fingerprint.of(self.base.config)
        write_adapter(out, config, self.tensors, base=base, fingerprint=fingerprint, quantization={})

    def _compare(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        whole = merge_obstacle(module) is not None
        kind = None if whole else kind_of(module)
        if path in self.whole:
            return
        if kind is None and not whole and len(self.before.shape(name)) == 3:
            matrices = differing_experts(self.before, self.after, name, self.r, self.energy)
            if matrices is not None:
                self.experts[path][leaf] = matrices
                self.ranks[name], self.energies[name] = matrices.rank, matrices.energy
            return
        one, other = self._read(name)
        if torch.equal(one, other):
            return
        if kind is not None and leaf == "weight":
            self._factorise(path, other - one)
        elif kind is not None and leaf == "bias":
            self.biases.add(path)
        elif kind is None and len(list(module.children())) == 0:
            self._save_whole(path, module)
        else:
            raise InputError(
                f"{name} differs, and neither factors nor modules_to_save can hold it.", where=str(self.tuned.folder)
            )

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """The parameter in both models, in float32: their files may have dtypes of their own."""
        pair = self.before.read(name).float(), self.after.read(name).float()
        for model, tensor in zip((self.base, self.tuned), pair, strict=True):
            if not tensor.isfinite().all():
                raise InputError(f"{name} holds NaN or infinity.", where=str(model.folder))
        return pair

    def _factorise(self, path: str, difference: Tensor) -> None:
        module = self.modules[path]
        matrix = difference.flatten(1)
        matrix = matrix.t() if isinstance(module, Conv1D | nn.Embedding) else matrix
        size = torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()
        product, kept = leading(matrix, self.r, self.energy, zlib.crc32(path.encode()))
        self.energies[path] = (kept * size, size)
        self._put(path, product)
        for target, source in self.base.skeleton.all_tied_weights_keys.items():
            if source == f"{path}.weight" and isinstance(module, nn.Embedding):  # the head is its table too
                head = target.rpartition(".")[0]
                self.energies[head] = self.energies[path]
                self._put(head, Product(product.B.T, product.A.T))

    def _put(self, path: str, product: Product) -> None:
        kind = kind_of(self.modules[path])
        assert kind is not None
        self.ranks[path] = product.rank
        for name, factor in (("lora_A", product.A), ("lora_B", product.B)):
            suffix, shaped = kind.in_file(self.modules[path], name, factor.contiguous())
            self.tensors[f"{path}.{suffix}"] = shaped.to(self.dtype)

    def _save_whole(self, path: str, module: nn.Module) -> None:
        self.whole.append(path)
        for leaf, _ in module.named_parameters(recurse=False):
            self.tensors[f"{path}.{leaf}"] = self.after.read(f"{path}.{leaf}")

    def _add_biases(self) -> None:
        """An adapter holds the biases of all its modules or of none; where only a bias differs, ΔW is 0."""
        for path in sorted(self.biases - self.ranks.keys()):
            kind = kind_of(self.modules[path])
            assert kind is not None
            out, into = kind.shape(self.modules[path])
            self._put(path, Product(torch.zeros(1, into), torch.zeros(out, 1)))
        for path in self.ranks if self.biases else ():
            if f"{path}.bias" in self.after:
                self.tensors[f"{path}.base_layer.bias"] = self.after.read(f"{path}.bias")

    def _check(self) -> None:
        for model in (self.base, self.tuned):
            if decode_stored(model) is not None:
                raise InputError("The model is quantised; a difference needs dense weights.", where=str(model.folder))
        missing = sorted(set(self.before.names) ^ set(self.after.names))
        if missing:
            raise InputError(f"Only one of the models has {shorten(missing)}.", where=str(self.tuned.folder))
        wrong = [
            f"{name} {list(self.before.shape(name))} and {list(self.after.shape(name))}"
            for name in self.before.names
            if self.before.shape(name) != self.after.shape(name)
        ]
        if wrong:
            raise InputError(f"The models differ in shape: {shorten(wrong)}.", where=str(self.tuned.folder))
