"""The tree of a pack whose examples begin alike: what they have in common once, and where they part."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lowrank.data.batches.batch_plan import BatchPlan
from lowrank.data.batches.grouping import Members
from lowrank.data.batches.pack_forest import forest_of
from lowrank.data.preview.token_text import visible

SHOWN = 48
"""Characters of a segment's text."""


@dataclass
class Branch:
    """One segment, and those that go on from it; `told` says what it is."""

    told: str
    branches: list[Branch] = field(default_factory=list)


def tree_of(plan: BatchPlan, members: Members, tokenizer: PreTrainedTokenizerBase) -> list[Branch]:
    """The segments of a pack with shared beginnings, each under its parent; of another pack none."""
    if members.shared is None or not members.shared.any():
        return []
    examples = [plan.examples.arrays(int(row))[0] for row in members.rows]
    forest = forest_of([len(ids) for ids in examples], members.shared.tolist())
    ends = [sum(forest.segments[: number + 1]) for number in range(len(forest.segments))]
    found: list[Branch] = []
    top: list[Branch] = []
    for number, (tokens, start) in enumerate(zip(forest.segments, forest.starts, strict=True)):
        through = sum(bool((places == ends[number] - 1).any()) for places in forest.rows)
        ids = examples[forest.first_rows[number]][start : start + tokens].tolist()
        text = " ".join(visible(str(tokenizer.decode(ids))).split())
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
        held = f"{tokens} tokens" if through == 1 else f"{tokens} tokens of {through} examples"
        found.append(Branch(f"{held}: {text}"))
        parent = forest.parents[number]
        (top if parent < 0 else found[parent].branches).append(found[-1])
    return top
