"""What the reference makes of each answer: it never changes, so it is asked once, before the first step, and kept.

The reference is the base with its adapter silenced, or the model as training begins; no second model is held. Its
log-probabilities are kept in the cache by all that they depend on, and proved on a few rows at each start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lowrank.adapters import describe, disabled
from lowrank.attention import segments
from lowrank.config import RunConfig
from lowrank.config.sections import ModelSection, TrainingSection
from lowrank.data import Batch, BatchPlan
from lowrank.data.batches.grouping import Members
from lowrank.data.batches.order import Batches
from lowrank.paths import cache_folder, hub_commit
from lowrank.recipes.parts.setup import Setup
from lowrank.training.callbacks.progress import Screen, Task
from lowrank.training.losses.preference import PreferenceLoss
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.machine.ranks import ALONE, Ranks

_PROVED = 2
"""Batches that are asked again where answers are kept."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_ROUNDED = 2e-2
"""Of a sum of log-probabilities, the part that may differ where products are in 16 bits."""


def with_reference(setup: Setup, config: RunConfig, console: Console, ranks: Ranks = ALONE) -> Setup:
    """The setup, whose batches know what the reference makes of their answers; as it was where none is asked for."""
    judge = setup.judge
    if judge is None or not judge.referenced:
        return setup
    held_out, dtype = setup.held_out, setup.products.dtype
    with Screen(console) as screen, freed_blocks_kept():
        asking = (config, setup.model, judge, dtype, screen.task, ranks)
        plan = knowing_the_reference(setup.plan, *asking)
        held_out = None if held_out is None else knowing_the_reference(held_out, *asking)
    return replace(setup, plan=plan, held_out=held_out)


def with_pretended_reference(setup: Setup) -> Setup:
    """The setup, under a reference to which every answer is certain: enough to see what a step takes."""
    if setup.judge is None or not setup.judge.referenced:
        return setup
    plans = [None if plan is None else _pretended(plan) for plan in (setup.plan, setup.held_out)]
    assert plans[0] is not None
    return replace(setup, plan=plans[0], held_out=plans[1])


def _pretended(plan: Any) -> BatchPlan:
    assert isinstance(plan, BatchPlan), "preferences are not streamed"
    assert plan.trees is not None
    none = np.zeros(plan.trees.answers)
    return replace(plan, trees=plan.trees.with_reference(none, none if plan.trees.mismatched else None), _epochs={})


def knowing_the_reference(
    plan: Batches,
    config: RunConfig,
    model: Any,
    judge: PreferenceLoss,
    dtype: torch.dtype,
    task: Task,
    ranks: Ranks = ALONE,
) -> BatchPlan:
    """A plan with what the reference makes of its answers.

    Args:
        plan: Of preferences.
        config: Says what the reference is.
        model: As training begins, or another that is the reference once its adapters are silenced.
        judge: Knows how answers are asked about.
        dtype: Of products.
        task: Shows how far it is.
        ranks: The processes that share the work.
    """
    assert isinstance(plan, BatchPlan), "preferences are not streamed"
    begun = begins_with_adapter(config.model, config.training)
    asked = _Asked(model, judge, plan, ranks, silent=bool(describe(model)) and not begun)
    place = cache_folder() / "reference" / f"{_key(config, plan, dtype)}.npy"
    kept = ranks.first(_read(place, asked.size) if ranks.main else None)
    if kept is not None and asked.confirms(kept, _TOLERANCE.get(dtype, _ROUNDED)):
        return asked.told(kept)
    with task("asking the reference", len(plan.epoch(0))) as advance:
        found = asked.all(advance)
    if ranks.main:
        _keep(place, found)
    return asked.told(found)


def begins_with_adapter(model: ModelSection, training: TrainingSection) -> bool:
    """Whether the reference is the model with the adapter that training goes on from."""
    return model.adapter is not None and training.reference != "base"


class _Asked:
    """The reference, asked for a plan's answers: (answers of the table,), and behind them those beside, if any."""

    def __init__(self, model: Any, judge: PreferenceLoss, plan: BatchPlan, ranks: Ranks, *, silent: bool) -> None:
        assert plan.trees is not None
        self.model, self.judge, self.plan, self.ranks, self.silent = model, judge, plan, ranks, silent
        self.answers, self.two = plan.trees.answers, plan.trees.mismatched
        self.size = self.answers * (1 + self.two)

    def told(self, known: np.ndarray) -> BatchPlan:
        """The plan, with what is known."""
        assert self.plan.trees is not None
        own, beside = known[: self.answers], known[self.answers :] if self.two else None
        return replace(self.plan, trees=self.plan.trees.with_reference(own, beside), _epochs={})

    def all(self, advance: Callable[[int], None]) -> np.ndarray:
        """Of every answer of the plan; processes share the work. What is in no batch of the plan stays not a number."""
        found = np.full(self.size, np.nan)
        left = iter(self.plan.epoch(0))
        while group := list(islice(left, self.ranks.count)):
            mine = self.ranks.index < len(group)
            places, values = self._of(group[self.ranks.index if mine else 0])  # all go through the model equally often
            if mine:
                found[places] = values
            advance(len(group))
        return np.fmax.reduce(self.ranks.all(found))  # of what is a number in one of them

    def confirms(self, kept: np.ndarray, tolerance: float) -> bool:
        """Whether the first batches still give what is kept."""
        same = True
        for members in self.plan.epoch(0)[:_PROVED]:
            places, values = self._of(members)
            same &= np.allclose(kept[places], values, rtol=tolerance, atol=tolerance)
        return not self.ranks.any(not same)

    @torch.no_grad()
    def _of(self, members: Members) -> tuple[np.ndarray, np.ndarray]:
        """Of one batch's answers: where they are among all, and what the reference makes of each."""
        trees, model = self.plan.trees, self.model
        assert trees is not None
        was_training = model.training
        model.eval()
        batch = self.plan.batch(members).to(model.get_input_embeddings().weight.device)
        rows = members.rows.tolist()
        places = np.concatenate([np.arange(len(trees.branches(row))) + trees.begins(row) for row in rows])
        with disabled(model) if self.silent else nullcontext():
            values = [self._values(part) for part in (batch, batch.beside) if part is not None]
        model.train(was_training)
        return np.concatenate([places, *([places + self.answers] if self.two else [])]), np.concatenate(values)

    def _values(self, batch: Batch) -> np.ndarray:
        with segments(self.model, batch.segments, batch.parents, batch.padded):
            return self.judge.answer_log_probs(self.model, batch).double().cpu().numpy()


def _key(config: RunConfig, plan: BatchPlan, dtype: torch.dtype) -> str:
    """A name for all that the reference's answers depend on."""
    trees = plan.trees
    assert trees is not None
    base = config.model
    told = [
        plan.examples.fingerprint,
        base.model_dump(mode="json", exclude={"compute_dtype", "device"}),
        None if config.quantization is None else config.quantization.model_dump(mode="json"),
        _stamp(base.name_or_path),
        hub_commit(base.name_or_path, base.revision),
        None if base.adapter is None else (_stamp(base.adapter), hub_commit(base.adapter)),
        begins_with_adapter(config.model, config.training),
        str(dtype),
        trees.mismatched,
    ]
    return hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=16).hexdigest()


def _stamp(path: str) -> list[tuple[str, int, int]]:
    """What tells that files have changed; of a name on the hub nothing, whose revision is in the config."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) if folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _read(place: Path, size: int) -> np.ndarray | None:
    """What is kept; None where there is nothing, or something else."""
    try:
        kept = np.load(place)
    except (OSError, ValueError):
        return None
    return kept if kept.shape == (size,) else None


def _keep(place: Path, found: np.ndarray) -> None:
    """For the next start; a cache that cannot be written keeps nothing."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=place.parent, suffix=".npy", delete=False) as file:
            np.save(file, found)
        Path(file.name).replace(place)
