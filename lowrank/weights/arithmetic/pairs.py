"""Two model folders of one architecture, parameter by parameter: what each holds under a name."""

from __future__ import annotations

import torch

from lowrank.errors import InputError
from lowrank.ops.precision import precise
from lowrank.weights.files.adapter_file import shorten
from lowrank.weights.files.dequantise import decode_stored
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.files.stored import Stored


class Pair:
    """A base and the same model, trained further.

    A parameter that a file leaves out because it is tied is read under the name that it is tied to: so the two models
    may be tied differently. Persistent buffers count as parameters.

    Attributes:
        names: Every parameter that both models have, in the architecture's order.

    Raises:
        InputError: A model is quantised, or one has parameters that the other lacks.
    """

    def __init__(self, base: ModelFolder, tuned: ModelFolder) -> None:
        self.base, self.tuned = base, tuned
        self.before, self.after = Stored(base), Stored(tuned)
        for model in (base, tuned):
            if decode_stored(model) is not None:
                raise InputError("the model is quantised; a difference needs dense weights", where=str(model.folder))
        every = [*base.skeleton.state_dict(), *self.before.names, *tuned.skeleton.state_dict(), *self.after.names]
        places = {name: self.places(name) for name in dict.fromkeys(every)}
        missing = [name for name, found in places.items() if found.count(None) == 1]
        if missing:
            raise InputError(f"only one of the models has {shorten(missing)}", where=str(tuned.folder))
        self.names = [name for name, found in places.items() if None not in found]

    def places(self, name: str) -> tuple[str | None, str | None]:
        """The names under which the two models' files hold a parameter; None where they do not."""
        return _held(self.before, name), _held(self.after, name)

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Before and after."""
        one, other = self._found(name)
        return self.before.shape(one), self.after.shape(other)

    def tied_with(self, name: str) -> list[str]:
        """The other parameters that are the same tensor in both models."""
        groups = [
            {other for other in self.names if model.untied(other) == model.untied(name)}
            for model in (self.base, self.tuned)
        ]
        return sorted((groups[0] & groups[1]) - {name})

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Before and after, in float32 where they are floats: the files may have dtypes of their own.

        Raises:
            InputError: NaN or infinity.
        """
        one, other = self._found(name)
        pair = _precise(self.before.read(one)), _precise(self.after.read(other))
        for model, tensor in zip((self.base, self.tuned), pair, strict=True):
            if not tensor.isfinite().all():
                raise InputError(f"{name} holds NaN or infinity", where=str(model.folder))
        return pair

    def read_after(self, name: str) -> torch.Tensor:
        """What the tuned model's files hold, in their dtype."""
        return self.after.read(self._found(name)[1])

    def same_bytes(self, name: str) -> bool:
        """Whether the files hold the very same tensors for it: this needs no knowledge of what they become."""
        one, other = self._found(name)
        before, after = self.before.raw(one), self.after.raw(other)
        return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    def _found(self, name: str) -> tuple[str, str]:
        one, other = self.places(name)
        assert one is not None, name
        assert other is not None, name
        return one, other


def _held(stored: Stored, name: str) -> str | None:
    if name in stored:
        return name
    ties = stored.model.skeleton.all_tied_weights_keys
    source = ties.get(name, name)
    group = [source, *(target for target, other in ties.items() if other == source)]
    return next((other for other in group if other in stored), None) if len(group) > 1 and name in group else None


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.to(precise(tensor.dtype))
    return tensor.to(torch.int64)
