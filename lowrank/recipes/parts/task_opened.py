"""A model that has learned a task other than the next token, as its folder says: a base, or an adapter on one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from lowrank.errors import InputError
from lowrank.models import Head, cannot_load, check_folder, load_model, load_tokenizer, new_modules
from lowrank.paths import expanded
from lowrank.recipes.parts.opened import adapter_folder, base_name, tokenizer_of
from lowrank.tasks.kinds_of_task import REWARD_LABELS, TASK_KINDS
from lowrank.tasks.registry import TASKS
from lowrank.tasks.task import Task
from lowrank.weights import load as load_onto
from lowrank.weights.files.adapter_file import AdapterFile, open_adapter


def task_in(path: str, *, trust_remote_code: bool = False) -> str | None:
    """The name of the task that a folder's adapter or model has learned; None for the next token."""
    path, folder = expanded(path), adapter_folder(path)
    if folder is not None:
        file = open_adapter(folder)
        return _of_labels(_by_type(file.config.task_type), file.head.get("id2label"))
    check_folder(path)
    config = _config_of(path, trust_remote_code)
    return _of_labels(_by_class(config), config.id2label)


def open_task(
    path: str, *, base: str | None = None, trust_remote_code: bool = False, task: str | None = None
) -> tuple[Task, Any, PreTrainedTokenizerBase]:
    """The task with its labels, the model, its tokenizer.

    Args:
        path: A model's folder or name, or an adapter's folder or name.
        base: The adapter's base, where it is not the one that the adapter names.
        trust_remote_code: Whether code that comes with the model may run.
        task: What it has learned, where its files do not say: that of a decoder merged with an embedding's adapter.

    Raises:
        InputError: it has learned no such task, or cannot be loaded.
    """
    name = task or task_in(path, trust_remote_code=trust_remote_code)
    if name is None:
        raise InputError(
            f"{path} has learned none of {', '.join(TASK_KINDS)}",
            fix=f"Give --task, or talk to it: lowrank chat {path}.",
        )
    path, folder = expanded(path), adapter_folder(path)
    auto_class = TASK_KINDS[name].auto_class
    if folder is None:
        if base is not None:
            raise InputError(f"{path} is no adapter's folder, and only an adapter has another base")
        model = load_model(path, head=Head(auto_class, {}, name), trust_remote_code=trust_remote_code)
        _refuse_made_up(new_modules(model), [], path)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return TASKS[name].of_config(model.config), model, tokenizer
    file = open_adapter(folder)
    model = load_model(
        base_name(file, base),
        revision=file.revision_of(base),
        trust_remote_code=trust_remote_code,
        head=head_in(file, name),
    )
    put_on(model, file)
    return TASKS[name].of_config(model.config), model, tokenizer_of(file, base, trust_remote_code)


def put_on(model: Any, file: AdapterFile) -> None:
    """Puts a task's adapter on its base.

    Raises:
        InputError: it does not fit, or a part of the head is in neither's files.
    """
    load_onto(model, file.path)
    _refuse_made_up(new_modules(model), file.config.modules_to_save or [], str(file.path))


def head_in(file: AdapterFile, name: str) -> Head:
    """What a task's adapter says of its head: the labels.

    Raises:
        InputError: it does not say.
    """
    settings = dict(file.head)
    if "id2label" in settings:
        settings["id2label"] = {int(number): label for number, label in settings["id2label"].items()}
    if not settings and name != "embedding":
        raise InputError(
            "the adapter does not say what its labels are, as those that lowrank writes do",
            where=str(file.path),
            fix="Merge it first (lowrank merge), and name the labels in the config.json of what comes out.",
        )
    return Head(TASK_KINDS[name].auto_class, settings, name)


def _refuse_made_up(new: tuple[str, ...], saved: list[str], path: str) -> None:
    """Raises InputError where a module that the base's files lack is not in the adapter's either."""
    missing = [one for one in new if not any(f".{name}." in f".{one}." for name in saved)]
    if missing:
        raise InputError(
            f"neither it nor its base holds the weights of {', '.join(missing)}, which would be random", where=path
        )


def _by_type(task_type: str | None) -> str | None:
    return next((name for name, kind in TASK_KINDS.items() if kind.task_type == task_type), None)


def _of_labels(name: str | None, labels: Mapping[Any, str] | None) -> str | None:
    """A classifier whose one output is called a reward is a reward model."""
    named = {int(number): label for number, label in (labels or {}).items()}
    return "reward" if name == "sequence_classification" and named == REWARD_LABELS else name


def _by_class(config: Any) -> str | None:
    """By what a model's config says of its class."""
    ends = {name: kind.auto_class.removeprefix("AutoModel") or "Model" for name, kind in TASK_KINDS.items()}
    named = str((config.architectures or [""])[0]).replace("HeadModel", "Head").replace("HeadsModel", "Heads")
    return next((name for name, end in ends.items() if named.endswith(end)), None)


def _config_of(path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise cannot_load(path, error) from error
