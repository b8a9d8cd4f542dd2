"""How good a text is: a number that is greater for the chosen of two texts than for the rejected one."""

from __future__ import annotations

import math
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
from lowrank.data.reading.conversation import Conversation, Plain, Preference
from lowrank.data.reading.formats import detect, read_row
from lowrank.data.reading.row_error import RowError
from lowrank.tasks.kinds_of_task import REWARD_LABELS
from lowrank.tasks.reading import Encoded
from lowrank.tasks.task import Prediction, SummedLoss, Wishes


@dataclass(frozen=True, slots=True)
class PairPayload:
    """What a batch needs of a row beside its tokens.

    Attributes:
        lengths: Tokens of the chosen text and of the rejected one; of one text alone where it is only asked about.
        margin: By how much the chosen one's reward should at least be the greater.
    """

    lengths: tuple[int, ...]
    margin: float = 0.0


class Reward:
    """The task; it has no labels to know."""

    name = "reward"

    def encoder(self, wishes: Wishes) -> Any:
        """A row's two texts."""
        return _paired

    def learned_from(self, examples: Examples, wishes: Wishes) -> Rewarder:
        """The rows say nothing more."""
        return Rewarder()

    def of_config(self, config: Any) -> Rewarder:
        """As it is trained."""
        return Rewarder()

    def unlabelled(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
        """One text or conversation, or a pair of which both are told."""
        form = detect(row)
        if form == "preference":
            return _paired(row, tokenizer, longest)
        content = read_row(row, form, tokenizer.chat_template is not None)
        assert not isinstance(content, Preference)
        if content.is_empty:
            raise RowError("the row says nothing", "Write a text, or leave the row out.")
        ids, cut = _ids(content, tokenizer, longest)
        return _encoded([ids], cut, 0.0)


@dataclass(frozen=True)
class Rewarder:
    """One output for each text; rows are pairs of them (Bradley and Terry's model)."""

    name = Reward.name

    @property
    def settings(self) -> dict[str, Any]:
        """One output, called a reward."""
        return {"id2label": dict(REWARD_LABELS), "label2id": {name: number for number, name in REWARD_LABELS.items()}}

    @property
    def told(self) -> str:
        """What is greater than what."""
        return "a reward for each text, greater for the chosen one of a row than for the rejected one"

    def collate(self, parts: Sequence[IdsAndMask], payloads: Sequence[Any], pad_token_id: int) -> Batch:
        """Each text a row: a row's own one after another; `places` (b, 2) says where, -1 for none."""
        texts: list[IdsAndMask] = []
        places = np.full((len(parts), 2), -1, dtype=np.int64)
        for row, ((ids, mask), payload) in enumerate(zip(parts, payloads, strict=True)):
            ends = np.cumsum(payload.lengths)
            for at, (end, length) in enumerate(zip(ends, payload.lengths, strict=True)):
                places[row, at] = len(texts)
                texts.append((ids[end - length : end], mask[end - length : end]))
        margins = torch.tensor([one.margin for one in payloads], dtype=torch.float32)
        given = {"places": torch.from_numpy(places), "margins": margins}
        return replace(padded_batch(texts, pad_token_id), given=given, supervised=len(parts))

    def loss(self, plain: bool = False) -> SummedLoss:
        """-log sigmoid of how much greater the chosen text's reward is, less the margin."""
        return SummedLoss(self, "-log sigmoid(reward of the chosen text - reward of the rejected one - margin)")

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(b, 2); not a number where a row has no second text."""
        rewards = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()[:, 0]
        places = batch.given["places"]
        return rewards[places.clamp(min=0)].masked_fill(places < 0, math.nan)

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(b,)."""
        return -functional.logsigmoid(outputs[:, 0] - outputs[:, 1] - batch.given["margins"])

    def predictions(self, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """The reward, or both and which of the two texts has the greater one."""
        found = []
        for chosen, rejected in np.concatenate(outputs).tolist():
            if math.isnan(rejected):
                found.append(Prediction(f"{chosen:.6g}", {"reward": chosen}))
            else:
                found.append(Prediction(_better(chosen, rejected), {"chosen": chosen, "rejected": rejected}))
        return found

    def answers(
        self, outputs: Sequence[np.ndarray], examples: Examples, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, str, str]]:
        """The two texts, that the chosen one is the better, and which of them the rewards say it is."""
        found = []
        for index, one in enumerate(self.predictions(outputs)):
            parts = np.split(examples.arrays(index)[0], np.cumsum(examples.payload(index).lengths)[:-1])
            chosen, rejected = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
            found.append((f"chosen: {chosen}\nrejected: {rejected}", "chosen", one.said))
        return found

    def scores(self, outputs: Sequence[np.ndarray], examples: Examples) -> dict[str, float]:
        """How often the chosen text's reward is the greater, and by how much on average."""
        chosen, rejected = np.concatenate(outputs).astype(np.float64).T
        return {"accuracy": float((chosen > rejected).mean()), "margin": float((chosen - rejected).mean())}

    def refuse_others(self, examples: Examples) -> None:
        """There are no labels."""

    def expected(self, payload: Any) -> str:
        """The pair, and its margin."""
        return "chosen over rejected" + (f" by {payload.margin:g}" if payload.margin else "")


def _better(chosen: float, rejected: float) -> str:
    return "chosen" if chosen > rejected else "rejected" if rejected > chosen else "neither"


def _paired(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
    content = read_row(_as_pair(row), "preference", tokenizer.chat_template is not None)
    assert isinstance(content, Preference)
    if content.others:
        raise RowError("the row has several rejected answers", "Write a row for each.")
    if content.chosen == content.rejected:
        raise RowError("chosen and rejected are the same", "There is nothing to learn from the row: leave it out.")
    (chosen, cut), (rejected, also) = (_ids(one, tokenizer, longest) for one in (content.chosen, content.rejected))
    if np.array_equal(chosen, rejected):
        what = "are the same tokens, as far as they are read" if cut or also else "are the same tokens"
        raise RowError(f"chosen and rejected {what}", "Raise data.max_length, or leave the row out.")
    return _encoded([chosen, rejected], cut or also, content.margin or 0.0)


def _as_pair(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Two texts that stand alone follow an empty prompt; what is JSON of messages is none."""
    there = {key: value for key, value in row.items() if value is not None}
    texts = [there.get(key) for key in ("chosen", "rejected")]
    if "prompt" in there or not all(isinstance(one, str) and not one.lstrip().startswith("[{") for one in texts):
        return there
    return {"prompt": "", **there}


def _ids(
    content: Conversation | Plain, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> tuple[np.ndarray, bool]:
    """Tokens (n,) int32 as TRL makes them: messages in the chat template, a text with the token of its end after it;
    and whether they are cut, of which the beginning is read.

    Raises:
        RowError: there is no chat template for messages, or no token comes of it.
    """
    if isinstance(content, Plain):
        text, end = content.prompt + content.completion, tokenizer.eos_token
        ids = tokenizer(text if end is None or text.endswith(end) else text + end)["input_ids"]
    elif tokenizer.chat_template is None:
        raise RowError("the row has messages, and the base has no chat template", "Write chosen and rejected as text.")
    else:
        found: Any = tokenizer.apply_chat_template(content.messages, tools=content.tools, return_dict=True)
        ids = found["input_ids"]
    if not ids:
        raise RowError("the text gives no token")
    return np.array(ids[:longest], dtype=np.int32), longest is not None and len(ids) > longest


def _encoded(texts: Sequence[np.ndarray], cut: bool, margin: float) -> Encoded:
    """Texts one after another; the last token of the first stands for the row."""
    lengths = tuple(map(len, texts))
    marks = np.zeros(sum(lengths), dtype=bool)
    marks[lengths[0] - 1] = True
    return Encoded(np.concatenate(texts), marks, PairPayload(lengths, margin), cut, longest=max(lengths))
