"""Texts that belong together lie near one another: embeddings, trained on pairs against the others of their batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lowrank.data import Batch, Examples, padded_batch
from lowrank.data.examples.example import IdsAndMask
from lowrank.data.reading.row_error import RowError
from lowrank.errors import InputError
from lowrank.tasks.encoding import encoded_text
from lowrank.tasks.measures import retrieval_scores
from lowrank.tasks.reading import Encoded
from lowrank.tasks.task import Prediction, SummedLoss, Wishes

_KEYS = ("anchor", "positive", "negative")


class Embedding:
    """The task; it has no labels to know."""

    name = "embedding"

    def encoder(self, wishes: Wishes) -> Any:
        """A row's two or three texts."""
        return _paired

    def learned_from(self, examples: Examples, wishes: Wishes) -> Embedder:
        """InputError: there is one row alone, and so nothing to tell its texts from."""
        if len(examples) < 2:
            raise InputError("there is one row, and no other to tell it from", where=examples.rows.name)
        return Embedder()

    def of_config(self, config: Any) -> Embedder:
        """As it is trained."""
        return Embedder()

    def unlabelled(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
        """One text."""
        ids, _, cut = encoded_text(row.get("text"), None, tokenizer, longest)
        return _encoded([ids], cut)


@dataclass(frozen=True)
class Embedder:
    """The means of a text's last hidden states, of length one; what is near by their cosine.

    Attributes:
        scale: What cosines are multiplied by before the softmax: as in sentence-transformers' ranking loss.
    """

    scale: float = 20.0
    name = Embedding.name

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing: the base has no head."""
        return {}

    @property
    def told(self) -> str:
        """What is near what."""
        return "each anchor nearer to its positive than to all others of its batch; cosines of mean hidden states"

    def collate(self, parts: Sequence[IdsAndMask], payloads: Sequence[Any], pad_token_id: int) -> Batch:
        """Each text a row: a row's own one after another; `places` (b, texts) says where, -1 for none."""
        texts, places = [], np.full((len(parts), max(map(len, payloads))), -1, dtype=np.int64)
        for row, ((ids, mask), lengths) in enumerate(zip(parts, payloads, strict=True)):
            ends = np.cumsum(lengths)
            for at, (end, length) in enumerate(zip(ends, lengths, strict=True)):
                places[row, at] = len(texts)
                texts.append((ids[end - length : end], mask[end - length : end]))
        batch = padded_batch(texts, pad_token_id)
        given = {"places": torch.from_numpy(places)}
        return replace(batch, given=given, supervised=len(parts))

    def loss(self, plain: bool = False) -> SummedLoss:
        """Cross-entropy of each anchor's own positive among all positives and negatives of the batch."""
        return SummedLoss(self, f"cross-entropy of each anchor's positive in its batch, cosines times {self.scale:g}")

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(b, texts, d); zeros where a row has no such text."""
        assert batch.attention_mask is not None
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
        mask = batch.attention_mask[..., None].float()
        means = functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
        places = batch.given["places"]
        return means[places.clamp(min=0)] * (places >= 0)[..., None]

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(b,). A text that is another row's positive word for word is not taken for wrong."""
        places, ids = batch.given["places"], batch.input_ids
        negatives = places[:, 2:].flatten()
        has = negatives >= 0
        candidates = torch.cat([outputs[:, 1], outputs[:, 2:].flatten(0, 1)[has]])
        scores = outputs[:, 0] @ candidates.t() * self.scale
        own = ids[places[:, 1]]
        others = torch.cat([own, ids[negatives[has]]])
        same = (own[:, None] == others[None]).all(dim=-1)
        same[:, : len(own)].fill_diagonal_(False)
        rows = torch.arange(len(own), device=scores.device)
        return functional.cross_entropy(scores.masked_fill(same, float("-inf")), rows, reduction="none")

    def predictions(self, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """Each text's vector."""
        found = []
        for row in outputs:
            vector = row[0, 0].tolist()
            said = f"{', '.join(f'{value:.3f}' for value in vector[:4])} ... ({len(vector)} numbers)"
            found.append(Prediction(said, vector=vector))
        return found

    def answers(
        self, outputs: Sequence[np.ndarray], examples: Examples, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, str, str]]:
        """Each anchor, its positive, and the positive that is nearest."""
        texts = [self._texts(examples, at, tokenizer) for at in range(len(examples))]
        anchors, positives = (np.concatenate([row[:, at] for row in outputs]) for at in (0, 1))
        nearest = (anchors @ positives.T).argmax(axis=1).tolist()
        return [(own[0], own[1], texts[at][1]) for own, at in zip(texts, nearest, strict=True)]

    def _texts(self, examples: Examples, index: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        parts = np.split(examples.arrays(index)[0], np.cumsum(examples.payload(index))[:-1])
        return [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts]

    def scores(self, outputs: Sequence[np.ndarray], examples: Examples) -> dict[str, float]:
        """How often an anchor's own positive is found among those of all rows."""
        anchors, positives = (np.concatenate([row[:, at] for row in outputs]) for at in (0, 1))
        parts = [np.split(examples.arrays(at)[0], np.cumsum(examples.payload(at))) for at in range(len(examples))]
        return retrieval_scores(
            anchors, positives, [part[0].tobytes() for part in parts], [part[1].tobytes() for part in parts]
        )

    def refuse_others(self, examples: Examples) -> None:
        """There are no labels."""

    def expected(self, payload: Any) -> str:
        """How many texts a row has."""
        return f"of {len(payload)} texts: {', '.join(_KEYS[: len(payload)])}"


def _paired(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
    found = []
    for key in _KEYS:
        if row.get(key) is None and key == "negative":
            continue
        if row.get(key) is None:
            raise RowError(f"the row has no {key}", 'Expected {"anchor": ..., "positive": ...}.')
        found.append(encoded_text(row[key], None, tokenizer, longest, key))
    if row["anchor"] == row["positive"]:
        raise RowError("anchor and positive are the same", "There is nothing to learn from the row: leave it out.")
    return _encoded([ids for ids, *_ in found], any(cut for *_, cut in found))


def _encoded(texts: Sequence[np.ndarray], cut: bool) -> Encoded:
    """Texts one after another; the last token of the first stands for the row."""
    marks = np.zeros(sum(map(len, texts)), dtype=bool)
    marks[len(texts[0]) - 1] = True
    lengths = tuple(map(len, texts))
    return Encoded(np.concatenate(texts), marks, lengths, cut, longest=max(lengths))
