"""The loss of a batch: cross-entropy of the supervised tokens, from hidden states.

Only the positions that carry loss meet the head, a chunk at a time. The head is tapped while the model runs: instead of
logits over the vocabulary it hands back a placeholder, and what it was given is turned into the loss by
`ops.cross_entropy`. That is exact for every model whose logits are its head's output, scaled or soft-capped as its
config says; `supervised_loss` proves it on the model at hand before the first step, and takes the model's own logits
where it is not so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lowrank.data import Batch, packed_batch
from lowrank.data.batches.batch import Targets
from lowrank.ops.cross_entropy import (
    LossOptions,
    cross_entropy,
    cross_entropy_through,
    each_cross_entropy,
    linear_cross_entropy,
)
from lowrank.ops.token_log_probs import token_log_probs

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}


class Loss(Protocol):
    """Sum of the cross-entropy over the supervised tokens of a batch's examples.

    Attributes:
        why: How it is computed, for a person.
        figures: Names of what a call gives behind the sums that are minimised; where there are any, or several such
            sums, it gives them as (k,).
    """

    why: str

    @property
    def figures(self) -> tuple[str, ...]:
        """What a run tells of each step beside the loss, by name."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """A scalar that gradients flow from; float32 at least."""
        ...

    def each(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The cross-entropy of each of the batch's targets, (m,), however many examples hold it; no gradient flows from
        it."""
        ...


class LogProbs(Protocol):
    """The log-probability of each of a batch's targets."""

    why: str

    def log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,), float32 at least, however many examples hold a target; gradients flow from it."""
        ...


def supervised_loss(model: Any, options: LossOptions | None = None) -> HiddenLoss | LogitsLoss:
    """The cheapest loss that is exact for this model.

    Args:
        model: A causal language model, adapters in.
        options: Label smoothing and z-loss; scale and soft cap are read from the model's config.
    """
    config = model.config.get_text_config()
    given = options or LossOptions()
    asked = LossOptions(
        logit_scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        label_smoothing=given.label_smoothing,
        z_loss=given.z_loss,
    )
    head = model.get_output_embeddings()
    if head is None:
        return LogitsLoss(model, given, "the model has no output head of its own")
    from_hidden = HiddenLoss(head, asked)
    reason = _disagreement(model, from_hidden, LogitsLoss(model, given, ""))
    return from_hidden if reason is None else LogitsLoss(model, given, reason)


class HiddenLoss:
    """Taps the head, and never holds more logits than one chunk."""

    why = "from hidden states, supervised tokens only"
    figures: tuple[str, ...] = ()

    def __init__(self, head: Any, options: LossOptions) -> None:
        self.head, self.options = head, options

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """A scalar; the head is not run for tokens without loss."""
        return self.of_parts(model, batch, [batch.targets])[0]

    def of_parts(self, model: nn.Module, batch: Batch, parts: Sequence[Targets]) -> list[torch.Tensor]:
        """A scalar for each part of a batch's targets, from one forward pass."""
        hidden = self._hidden(model, batch)
        return [self._of(hidden.index_select(0, part.places), part) for part in parts]

    def _of(self, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        head = self.head
        if type(head) is nn.Linear and "forward" not in head.__dict__:
            return linear_cross_entropy(
                hidden, head.weight, targets.tokens, head.bias, self.options, row_weights=targets.weights
            )
        return cross_entropy_through(
            head, hidden, targets.tokens, head.out_features, self.options, row_weights=targets.weights
        )

    @torch.no_grad()
    def each(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,)."""
        hidden = self._hidden(model, batch).index_select(0, batch.targets.places)
        tokens = batch.targets.tokens
        return each_cross_entropy(self.head, hidden, tokens, self.head.out_features, self.options)

    def log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,); gradients flow from it."""
        hidden = self._hidden(model, batch).index_select(0, batch.targets.places)
        return token_log_probs(self.head, hidden, batch.targets.tokens, self.head.out_features, self.options)

    def _hidden(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the head is given, (b·n, d)."""
        with _tapped(self.head) as given:
            _forward(model, batch)
        if len(given) != 1:
            raise RuntimeError(f"the head ran {len(given)} times in one forward pass")
        return given[0].flatten(0, -2)


class LogitsLoss:
    """From the model's own logits: for models that do more to them than their config says."""

    figures: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, options: LossOptions, why: str) -> None:
        self.options = options
        self.why = f"from the model's logits: {why}"
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """A scalar, from as few logits as the model's forward pass can be asked for."""
        return self._of(model, batch, batch.targets.weights, "sum")

    @torch.no_grad()
    def each(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,)."""
        return self._of(model, batch, None, "none")

    def log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,); gradients flow from it."""
        return -self._of(model, batch, None, "none")

    def _of(self, model: nn.Module, batch: Batch, weights: torch.Tensor | None, reduction: str) -> torch.Tensor:
        places, length = batch.targets.places, batch.input_ids.shape[1]
        if self._keeps:  # the same positions of every row: those that any row needs
            kept = torch.unique(places % length)
            logits = _forward(model, batch, kept).logits
            places = places // length * len(kept) + torch.searchsorted(kept, places % length)
        else:
            logits = _forward(model, batch).logits
        met = logits.flatten(0, -2).index_select(0, places)
        return cross_entropy(met, batch.targets.tokens, self.options, weights, reduction)


class Autocast:
    """Products in a shorter dtype than the weights that train."""

    def __init__(self, loss: Loss, dtype: torch.dtype) -> None:
        self.loss, self.dtype = loss, dtype
        self.why = f"{loss.why}; products in {str(dtype).removeprefix('torch.')}"
        self.figures = loss.figures

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """A scalar, in float32."""
        with torch.autocast(batch.input_ids.device.type, self.dtype):
            return self.loss(model, batch)

    def each(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,), in float32."""
        with torch.autocast(batch.input_ids.device.type, self.dtype):
            return self.loss.each(model, batch)

    def log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,), in float32, of a loss that is made of them."""
        assert isinstance(self.loss, (HiddenLoss, LogitsLoss))
        with torch.autocast(batch.input_ids.device.type, self.dtype):
            return self.loss.log_probs(model, batch)


def _forward(model: nn.Module, batch: Batch, logits_to_keep: torch.Tensor | None = None) -> Any:
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if logits_to_keep is not None:
        inputs["logits_to_keep"] = logits_to_keep
    return model(**inputs)


@contextmanager
def _tapped(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While it lasts the head notes what it is given and hands back one number a position instead of logits."""
    given: list[torch.Tensor] = []

    def note(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return hidden[..., :1]

    own = head.__dict__.get("forward")
    head.__dict__["forward"] = note
    try:
        yield given
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own


def _disagreement(model: Any, loss: HiddenLoss, reference: LogitsLoss) -> str | None:
    """Why the loss from hidden states is not this model's; None where the two agree."""
    batch = _probe(model)
    was_training = model.training
    model.eval()
    try:
        mine, expected = float(loss(model, batch).detach()), float(reference(model, batch).detach())
    except (RuntimeError, IndexError) as error:
        return f"its forward pass does not leave the head's place to others ({error})"
    finally:
        model.train(was_training)
    if abs(mine - expected) <= _TOLERANCE.get(model.dtype, 2e-2) * abs(expected):
        return None
    return f"{type(model).__name__} changes its head's output in a way its config does not tell"


def _probe(model: Any) -> Batch:
    """A few tokens, the same at every run, without touching the random state."""
    ids = np.arange(1, 9) * 7919 % model.config.get_text_config().vocab_size
    return packed_batch([(ids, np.arange(8) > 2)]).to(model.get_input_embeddings().weight.device)
