"""A model as its folder says: a base, or an adapter on the base that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import has_file

from lowrank.errors import InputError
from lowrank.models import load_model, load_tokenizer
from lowrank.paths import expanded
from lowrank.storage.hub import local_folder
from lowrank.weights import load as load_onto
from lowrank.weights.files.adapter_file import CONFIG_NAME, QUANTISED_FROM, AdapterFile, open_adapter
from lowrank.weights.files.notes import noted_ends, stop_at


def load(
    model: nn.Module | str | Path,
    path: str | Path | None = None,
    adapter: str = "default",
    strict: bool = True,
    trainable: bool = False,
) -> Any:
    """Puts an adapter onto a model; or, given the adapter's folder (a run's) alone, loads its base and puts it there.

    Args:
        model: The base that the adapter was trained on, or the folder or hub name of an adapter.
        path: A folder in peft's format, of any version; with the base.
        adapter: The name that it gets.
        strict: Refuse whatever does not fit; False warns with the list of what was skipped, and leaves it out.
        trainable: Whether its parameters require gradients.

    Returns:
        The model, with the adapter.

    Raises:
        InputError: Missing, unexpected or misshapen tensors, NaN, another base, a config key that is not known, a
            pickle; no adapter of that name. The model is then as it was.
    """
    if isinstance(model, nn.Module):
        if path is None:
            raise InputError(
                "which adapter is to be put onto the model is not said", fix="Give it: `lowrank.load(model, folder)`."
            )
        return load_onto(model, path, adapter, strict=strict, trainable=trainable)
    if path is not None:
        raise InputError(
            f"{model} is given beside {path}", fix="Give an adapter's folder alone, or a model and a folder."
        )
    if adapter_folder(str(model)) is None:
        raise InputError(f"there is no adapter {model}", fix="Give the folder of a run or an adapter.")
    return open_model(str(model), adapter=adapter, trainable=trainable)[0]


def open_model(
    path: str,
    *,
    base: str | None = None,
    use_adapter: bool = True,
    trust_remote_code: bool = False,
    adapter: str = "default",
    trainable: bool = False,
) -> tuple[Any, Any]:
    """The model of a folder or name, or an adapter on its base, quantised as it was while the adapter was trained.

    An adapter's tokenizer, and with it the chat template, is the one beside it; its answers end where it says so.

    Args:
        path: A model's folder or name, or an adapter's folder or name.
        base: The adapter's base, where it is not the one that the adapter names.
        use_adapter: False: the adapter's base alone, asked as the adapter is.
        trust_remote_code: Whether code that comes with the model may run.
        adapter: The name that the adapter gets.
        trainable: Whether its parameters require gradients.
    """
    path, folder = expanded(path), adapter_folder(path)
    if folder is None:
        if base is not None or not use_adapter:
            raise InputError(f"{path} is no adapter's folder, and only an adapter has another base")
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        return load_model(path, **options), load_tokenizer(path, **options)
    file = open_adapter(folder)
    model = base_of(file, base, trust_remote_code)
    tokenizer = tokenizer_of(file, base, trust_remote_code)
    if use_adapter:
        load_onto(model, folder, adapter, trainable=trainable)
    stop_at(model, tokenizer, noted_ends(folder))
    return model, tokenizer


def base_of(file: AdapterFile, base: str | None, trust_remote_code: bool) -> Any:
    """The base that an adapter was trained on, quantised as it was then; `base`: where it lies now."""
    trained_over = file.quantization or {}
    return load_model(
        base_name(file, base),
        dtype=trained_over.get(QUANTISED_FROM, "auto"),
        quantization=trained_over or None,
        revision=file.revision_of(base),
        trust_remote_code=trust_remote_code,
    )


def tokenizer_of(file: AdapterFile, base: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer beside an adapter; its base's where there is none."""
    if (file.path / "tokenizer_config.json").exists():
        return load_tokenizer(str(file.path), trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"revision": file.revision_of(base), "trust_remote_code": trust_remote_code}
    return load_tokenizer(base_name(file, base), **options)


def base_name(file: AdapterFile, base: str | None) -> str:
    """The folder or name of an adapter's base; `base` where that is given.

    Raises:
        InputError: neither is known.
    """
    if base is None and file.base is None:
        raise InputError(
            "the adapter does not say which base it belongs to", where=str(file.path), fix="Give it: --base."
        )
    return str(base or file.base)


def adapter_folder(path: str) -> Path | None:
    """Where the adapter of that path or name lies, fetched from the hub where it is there; None for a model."""
    path = expanded(path)
    if Path(path).is_dir():
        return Path(path) if (Path(path) / CONFIG_NAME).is_file() else None
    try:
        there = has_file(path, CONFIG_NAME)
    except (OSError, ValueError):  # no name of the hub's, no such repository, or no hub: what loads a model tells which
        there = False
    return local_folder(path, "adapter") if there else None
