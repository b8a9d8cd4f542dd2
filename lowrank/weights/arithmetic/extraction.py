"""A LoRA from the difference of two checkpoints, one module at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lowrank.adapters.methods.lora import LoraConfig
from lowrank.errors import InputError
from lowrank.storage.folders import into_folder, refuse_inside
from lowrank.weights.arithmetic.carriers import Carriers
from lowrank.weights.arithmetic.extract_proof import prove
from lowrank.weights.arithmetic.factors import check_limits, rank_fields
from lowrank.weights.arithmetic.pairs import Pair
from lowrank.weights.files.adapter_file import CONFIG_NAME
from lowrank.weights.files.fingerprint import Fingerprint, commit_of
from lowrank.weights.files.model_folder import open_base
from lowrank.weights.files.target_names import target_names
from lowrank.weights.files.writing import write_adapter


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was found.

    Attributes:
        out: The adapter's folder.
        ranks: Module path -> rank; modules that do not differ are not in it.
        kept: Module path -> the share of ‖W_tuned - W_base‖² that its factors keep.
        kept_of_all: The same over all modules together.
        whole: Modules saved whole, because what differs in them is no matrix (norms, single parameters, buffers).
        proved: How many tensors that differ were found again in the written adapter, loaded into the architecture.
        seconds: Time that it took.
    """

    out: Path
    ranks: dict[str, int]
    kept: dict[str, float]
    kept_of_all: float
    whole: list[str] = field(default_factory=list)
    proved: int = 0
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

    Linear layers, embeddings, convolutions and stacks of experts get factors; what differs otherwise (norms, single
    parameters, buffers, tables with more tokens) is saved whole, with the smallest module that is called and holds it.
    Before the folder appears, the adapter is loaded into the architecture, and every tensor of it compared with the
    tuned model's.

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
        InputError: The models cannot be read, differ in shape, or do not differ at all; or a tensor differs that no
            adapter can hold.
        JobError: The written adapter does not give the tuned model.
    """
    if r is None and energy is None:
        raise InputError("neither a rank nor an energy is given", fix="Give r (--rank) or energy (--energy).")
    check_limits(r, energy)
    started = time.monotonic()
    models = [open_base(name, trust_remote_code=trust_remote_code) for name in (base, tuned)]
    for model in models:
        refuse_inside(Path(out), model.folder)
    if (Path(out) / CONFIG_NAME).exists():
        raise InputError("the folder already holds an adapter", where=str(out), fix="Choose another folder.")
    pair = Pair(*models)
    found = Carriers(pair, r, energy, dtype)
    found.compare(progress)
    with into_folder(Path(out), last=CONFIG_NAME, overwrite=False) as work:
        _write(work, found, str(base))
        proved = prove(work, pair, found)
    return ExtractReport(
        out=Path(out),
        ranks=found.ranks,
        kept=found.kept,
        kept_of_all=found.kept_of_all,
        whole=found.whole,
        proved=proved,
        seconds=time.monotonic() - started,
    )


def _write(out: Path, found: Carriers, base: str) -> None:
    pair = found.pair
    config = LoraConfig(
        **rank_fields(found.ranks),
        target_modules=target_names(pair.base.skeleton, [path for path in found.ranks if path not in found.stacks]),
        target_parameters=list(found.stacks) or None,
        modules_to_save=found.whole or None,
        bias="lora_only" if found.biases else "none",
        task_type="CAUSAL_LM" if type(pair.base.skeleton).__name__.endswith("ForCausalLM") else None,
    )
    sizes = Fingerprint.of(pair.tuned.config if found.resized else pair.base.config)
    write_adapter(
        out,
        config,
        found.tensors,
        base=base,
        revision=commit_of(pair.base.config),
        fingerprint=replace(sizes, commit=commit_of(pair.base.config)),
        quantization={},
        notes=pair.tuned.folder,
    )
