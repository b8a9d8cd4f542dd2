"""What a merge did, and what its user should know."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.merging.merge_plan import Plan
from lowrank.weights.merging.proof import Proof
from lowrank.weights.merging.rounding import RoundingLoss
from lowrank.weights.merging.verify import Verification


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: The merged folder.
        base: The base's folder.
        tensors: How many tensors were written.
        changed: How many of them differ from the base's.
        size: Bytes of all tensors.
        seconds: Time that it took.
        rounding_loss: Norm of what rounding took away, as a share of the norm of the adapter's effect; measured on a
            quarter of the blocks of large tensors.
        worst: The tensor with the largest such share, and the share; None without low-rank updates.
        proof: How many tensors were tried on a random vector each; None where none was.
        verified: How near its answers are to base and adapter; None where that was not compared.
        notes: What the user should know (weights untied, a large loss), as sentences.
    """

    out: Path
    base: Path
    tensors: int
    changed: int
    size: int
    seconds: float
    rounding_loss: float
    worst: tuple[str, float] | None
    proof: Proof | None
    verified: Verification | None
    notes: list[str] = field(default_factory=list)


def make_report(
    out: Path,
    base: ModelFolder,
    plan: Plan,
    losses: dict[str, RoundingLoss],
    seconds: float,
    proof: Proof | None,
    verified: Verification | None,
) -> MergeReport:
    """What is told of a merge."""
    whole = total_loss(losses)
    worst = max(losses, key=lambda name: losses[name].share, default=None)
    notes = list(plan.notes)
    if whole.share > 0.1:
        notes.append(
            f"Rounding lost {whole.share:.0%} of the adapter's effect: its changes are small beside the weights' "
            "precision. Merging in float32 (--dtype float32) or rounding at random (--rounding stochastic) keeps more."
        )
    tensors = [tensor for shard in plan.shards.values() for tensor in shard]
    return MergeReport(
        out=out,
        base=base.folder,
        tensors=len(tensors),
        changed=sum(bool(tensor.changes) or tensor.decoder is not None for tensor in tensors),
        size=plan.size,
        seconds=seconds,
        rounding_loss=whole.share,
        worst=None if worst is None else (worst, losses[worst].share),
        proof=proof,
        verified=verified,
        notes=notes,
    )


def total_loss(losses: dict[str, RoundingLoss]) -> RoundingLoss:
    """The tensors' losses together."""
    whole = RoundingLoss()
    for loss in losses.values():
        whole.add(loss)
    return whole
