"""`set_attention`: give a loaded model a backend by name, or the fastest exact one."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from transformers import PreTrainedModel

from lowrank.attention.backends import BACKENDS
from lowrank.attention.paged import CHOSEN, PAGED
from lowrank.attention.setting import Setting, setting_of
from lowrank.errors import InputError


@dataclass(frozen=True)
class AttentionChoice:
    """What `set_attention` did: the backend's name, and why it was taken."""

    backend: str
    why: str

    def __str__(self) -> str:
        return f"attention: {self.backend} ({self.why})"


def set_attention(model: PreTrainedModel, backend: str = "auto", *, packing: bool = False) -> AttentionChoice:
    """Swap the attention of a loaded model, with or without adapters on it.

    Args:
        model: A transformers model.
        backend: A name in `BACKENDS`, or `auto`: the fastest that is exact for this model, device and dtype.
        packing: Packs of several examples will be trained on (run `check_packing` before the first).

    Raises:
        InputError: There is no such backend, it cannot serve what the model asks, or transformers left the model as it
            was.
    """
    if backend != "auto" and backend not in BACKENDS:
        near = difflib.get_close_matches(backend, [*BACKENDS, "auto"], n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise InputError(
            f"there is no attention backend `{backend}`{hint}", fix=f"It is one of: auto, {', '.join(BACKENDS)}."
        )
    setting = setting_of(model, packing)
    if backend == "auto" and not setting.swappable:
        return AttentionChoice(setting.current, f"transformers cannot swap the attention of {setting.architecture}")
    choice = fastest(setting) if backend == "auto" else AttentionChoice(backend, "asked for")
    refusal = BACKENDS[choice.backend].refusal(setting)
    if refusal is not None:
        raise InputError(
            f"the attention backend `{choice.backend}` cannot serve {setting.architecture}: {refusal}", fix=_TRY_AUTO
        )
    implementation = BACKENDS[choice.backend].implementation(setting)
    _swap(model, implementation, setting)
    if choice.backend != PAGED.name:
        CHOSEN.discard(model)
        return choice
    CHOSEN.add(model)
    return AttentionChoice(PAGED.name, f"asked for: answers many prompts at once; in training it is `{implementation}`")


_TRY_AUTO = "Use `attention: auto`, which takes the fastest backend that is exact for this model."


def fastest(setting: Setting) -> AttentionChoice:
    """The backend that `auto` takes: on a CPU `segments`, which asks the machine; on CUDA by what each is made for."""
    order = ("segments",) if setting.device.type == "cpu" else ("flash", "segments")
    refusals = {name: BACKENDS[name].refusal(setting) for name in order}
    name = next(name for name, refusal in refusals.items() if refusal is None)
    why = BACKENDS[name].praise
    if name == "segments" and setting.dropout:
        why += f"; its attention dropout of {setting.dropout:g} makes training take O(n²)"
    if name != order[0]:
        why += f"; not {order[0]}: {refusals[order[0]]}"
    return AttentionChoice(name, why)


def _swap(model: PreTrainedModel, implementation: str, setting: Setting) -> None:
    """Set it and read it back on every submodel: on some architectures transformers only logs that it did nothing."""
    if not setting.swappable and implementation != setting.current:
        raise InputError(
            f"transformers cannot swap the attention of {setting.architecture}: it stays `{setting.current}`",
            fix="Use `attention: auto`, which keeps what such a model has.",
        )
    model.set_attn_implementation(implementation)
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != implementation:
            raise InputError(
                f"transformers left {type(module).__name__} at `{module.config._attn_implementation}` "
                f"instead of `{implementation}`",
                where=name or None,
                fix="Use `attention: eager`.",
            )
