"""One evaluation of preferences: the loss, which answers the model holds for the better ones, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lowrank.attention import segments
from lowrank.data import BatchPlan
from lowrank.recipes.parts.assess import samples_of
from lowrank.recipes.parts.exam import Exam
from lowrank.training.callbacks.progress import Task
from lowrank.training.evaluation.evaluation import Evaluation, Sample
from lowrank.training.losses.preference import PreferenceLoss
from lowrank.training.machine.memory import freed_blocks_kept
from lowrank.training.machine.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class _Of:
    """What one row's answers have come to: its summands' losses, and each answer's reward and log-probability."""

    losses: np.ndarray
    own: float
    rewards: np.ndarray
    log_probs: np.ndarray


def assess_preferences(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: BatchPlan,
    judge: PreferenceLoss,
    task: Task,
    exam: Exam | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The loss of a pair (or answer), how often the better one has the larger reward, and by how much; processes share
    the work.

    Args:
        model: As it is asked.
        tokenizer: Of the model.
        held_out: What it is measured on; its batches know what the reference makes of their answers.
        judge: Its loss.
        task: Shows how far it is.
        exam: The prompts as questions, whose chosen answers are what is expected; None for the figures alone.
        ranks: The processes; all get the whole result.
    """
    with task("evaluating", len(held_out.epoch(0))) as advance, freed_blocks_kept():
        found = _looked_at(model, held_out, judge, advance, ranks)
    trees, rows = held_out.trees, range(len(held_out.examples))
    assert trees is not None
    verdicts = [held_out.examples.payload(row) for row in rows]
    own_tokens = trees.counts(list(rows))[1]
    losses = np.concatenate([one.losses for one in found])
    own = sum(one.own for one in found) * judge.objective.own_weight / own_tokens
    liked = np.concatenate([verdict.liked for verdict in verdicts])
    rewards, log_probs = (np.concatenate([getattr(one, name) for one in found]) for name in ("rewards", "log_probs"))
    apart = [one.rewards[a] - one.rewards[b] for one, v in zip(found, verdicts, strict=True) for a, b in v.pairs]
    margins = np.array(apart) if judge.paired else np.where(liked, rewards, -rewards)
    sides = {"chosen": liked, "rejected": ~liked}
    scores = {
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        **{f"reward_{name}": float(rewards[side].mean()) for name, side in sides.items() if side.any()},
        **{f"logp_{name}": float(log_probs[side].mean()) for name, side in sides.items() if side.any()},
        **({} if judge.kl is None else {"kl": float(judge.kl)}),
    }
    samples, match = _samples(exam, held_out, found, model, tokenizer, task, ranks)
    return Evaluation(float(losses.mean()) + own, len(losses), match, samples, scores)


def _samples(
    exam: Exam | None,
    held_out: BatchPlan,
    found: list[_Of],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    ranks: Ranks,
) -> tuple[tuple[Sample, ...], float | None]:
    """The answers to an exam and the share that are the chosen ones; without one none."""
    if exam is None:
        return (), None
    examples = held_out.examples
    rows = examples.table.example_rows[examples.order].tolist()
    of_row = {row: float(one.losses.mean()) for row, one in zip(rows, found, strict=True)}
    samples = samples_of(exam, of_row, model, tokenizer, task, ranks)
    return samples, sum(sample.correct for sample in samples) / len(samples)


@torch.no_grad()
def _looked_at(
    model: Any, plan: BatchPlan, judge: PreferenceLoss, on_batch: Callable[[int], None], ranks: Ranks
) -> list[_Of]:
    """What each example's answers come to, in the examples' order."""
    was_training = model.training
    model.eval()
    device, groups = model.get_input_embeddings().weight.device, []
    left = iter(plan.epoch(0))
    while group := list(islice(left, ranks.count)):
        groups.append(group)
    mine = [group[ranks.index if ranks.index < len(group) else 0] for group in groups]
    idle = int(bool(groups) and ranks.index >= len(groups[-1]))
    if plan.trees is not None and plan.trees.mismatched:
        judge.prepare(model, [plan.batch(members).to(device) for members in mine], idle, ranks)
    kept: list[tuple[int, _Of]] = []
    for number, (group, members) in enumerate(zip(groups, mine, strict=True)):
        batch = plan.batch(members).to(device)
        with segments(model, batch.segments, batch.parents, batch.padded):
            seen = judge.seen(model, batch)
        if number < len(groups) - idle:
            kept += zip(members.rows.tolist(), _by_row(plan, members.rows, judge, seen), strict=True)
        on_batch(len(group))
    model.train(was_training)
    return [one for _, one in sorted((part for share in ranks.all(kept) for part in share), key=lambda part: part[0])]


def _by_row(plan: BatchPlan, rows: np.ndarray, judge: PreferenceLoss, seen: Any) -> list[_Of]:
    """A batch's figures, row by row."""
    verdicts = [plan.examples.payload(int(row)) for row in rows]
    answers = np.cumsum([len(v.liked) for v in verdicts])[:-1]
    summands = np.cumsum([len(v.pairs) if judge.paired else len(v.liked) for v in verdicts])[:-1]
    losses, rewards, log_probs = (
        values.double().cpu().numpy()
        for values in (seen.judgement.losses, seen.judgement.rewards, seen.answers.log_probs)
    )
    parts = (np.split(losses, summands), np.split(rewards, answers), np.split(log_probs, answers))
    own = float(seen.own) / len(rows)  # of the batch as a whole: only its sum over all rows is told
    return [_Of(loss, own, reward, log_prob) for loss, reward, log_prob in zip(*parts, strict=True)]
