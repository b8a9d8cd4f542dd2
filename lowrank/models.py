"""Loading a base model and its tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import resolve_revision

from lowrank.errors import LFS_POINTER, InputError
from lowrank.paths import hub_commit
from lowrank.quantisers.registry import loading_config, settle
from lowrank.quantisers.untrainable import dense_config

_SHOWN = 5
_INDEX = "model.safetensors.index.json"
# What the tables of positions are called: modules with weights, or tensors of a module.
_TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings", "pos_encoding")


@dataclass(frozen=True, slots=True)
class Head:
    """What a task puts on a base.

    Attributes:
        auto_class: transformers' class that loads such models.
        settings: What of the base's config is otherwise: the names of labels, the token that pads.
        name: Of the task, for messages.
    """

    auto_class: str
    settings: Mapping[str, Any]
    name: str


def load_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: Head | None = None,
) -> PreTrainedModel:
    """A model from a folder or a hub, a causal language model unless it gets a head; only safetensors files are read.

    Args:
        name_or_path: A folder, or a name on the hub.
        dtype: "auto" (the checkpoint's), "bfloat16", "float16" or "float32".
        quantization: A quantiser's options (`load_in_4bit`, `bnb_4bit_quant_type` ...; `quant_method` for another than
            the first), or all that a quantised model's config notes; None for a dense model.
        device: "cpu", "cuda" ...; by default the accelerator if there is one.
        revision: Of a hub repository.
        trust_remote_code: Whether code that comes with the model may run.
        head: Of a task. What of it the files lack is new, by torch's random state; `new_modules` says what that is.

    Returns:
        The model in eval mode.

    Raises:
        InputError: there is no such model, it has no safetensors files or lacks weights, or the quantiser is missing or
            does not do what is asked for.
    """
    check_folder(name_or_path)
    if device is not None:
        usable_device(device)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = {"revision": resolve_revision(name_or_path, revision), "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {
        **source,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "use_safetensors": True,
        "output_loading_info": True,
    }
    quantised = None if quantization is None else loading_config(quantization)
    try:
        config = AutoConfig.from_pretrained(name_or_path, **source)
        options |= _placed(config, quantised, where, headed=head is not None)
        auto = AutoModelForCausalLM if head is None else _with_head(config, head, name_or_path)
        options |= {} if head is None else {"ignore_mismatched_sizes": True}
        with nullcontext() if head is None else _told_by_us():
            model, info = auto.from_pretrained(name_or_path, config=config, **options)
    except (torch.OutOfMemoryError, InputError):
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise cannot_load(name_or_path, error) from error
    _refuse_missing(model, info, name_or_path, headed=head is not None)
    model.config._commit_hash = hub_commit(name_or_path, revision)
    settle(model)
    return (model if "device_map" in options else model.to(where)).eval()


def _placed(config: Any, quantised: Any, where: str, *, headed: bool) -> dict[str, Any]:
    """How weights get to where they shall be: quantised on the way, or dense. With a device_map they go there tensor by
    tensor, and the host makes no copy of all.

    A head that the files lack takes the CPU's random numbers, wherever it is trained.
    """
    if quantised is not None:
        return {"quantization_config": quantised, "device_map": {"": where}}
    dense = dense_config(config)
    if dense is not None:
        return {"quantization_config": dense}
    return {} if headed or torch.device(where).type == "cpu" else {"device_map": {"": where}}


@contextmanager
def _told_by_us() -> Iterator[None]:
    """Without transformers' table of the weights that a new head lacks: that is as it should be, and what else is
    missing is refused."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_no_table)
    try:
        yield
    finally:
        logger.removeFilter(_no_table)


def _no_table(record: logging.LogRecord) -> bool:
    return " LOAD REPORT" not in record.getMessage()


def _refuse_missing(model: Any, info: Mapping[str, Any], name: str, *, headed: bool) -> None:
    """Raises InputError for weights that the files lack; those of a head are noted (`new_modules`)."""
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if headed and model.base_model is model:  # its pooler is not used
        missing = [key for key in missing if not key.startswith("pooler.")]
    elif headed:
        model._lowrank_new = _new_of(model, missing)
        missing = [key for key in missing if not key.startswith(tuple(f"{path}." for path in new_modules(model)))]
    if missing:  # transformers fills these with random numbers and goes on
        raise InputError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__}: "
            f"{', '.join(missing[:_SHOWN])}{' ...' if len(missing) > _SHOWN else ''}",
            fix=f"Take a complete checkpoint of a {'base' if headed else 'causal language model'}.",
        )


def auto_for(config: Any, auto_class: str, task: str, name: str) -> Any:
    """transformers' class of that name.

    Raises:
        InputError: it has no model of the config's architecture.
    """
    auto: Any = getattr(transformers, auto_class)
    if type(config) not in auto._model_mapping and auto_class not in getattr(config, "auto_map", {}):
        raise InputError(
            f"{name} is a {config.model_type}, of which transformers has no model for {task}",
            where="model.task",
            fix=f"Take a base that {auto_class} knows.",
        )
    return auto


def _with_head(config: Any, head: Head, name: str) -> Any:
    """The class that loads a model with that head; the config then says what the head is."""
    auto = auto_for(config, head.auto_class, head.name, name)
    for key, value in head.settings.items():
        if key != "pad_token_id" or getattr(config.get_text_config(), key, None) is None:
            setattr(config.get_text_config() if key == "pad_token_id" else config, key, value)
    return auto


def _new_of(model: PreTrainedModel, missing: list[str]) -> tuple[str, ...]:
    """The modules beside the base, and its pooler, of which the files lack weights."""
    base = f"{model.base_model_prefix}."
    modules = [key.rpartition(".")[0] for key in missing]
    pooler = [path for path in modules if path.startswith(f"{base}pooler.")]
    beside = [path.partition(".")[0] for path in modules if not path.startswith(base)]
    return tuple(dict.fromkeys([*pooler, *beside]))


def new_modules(model: Any) -> tuple[str, ...]:
    """The modules of a model loaded for a task that its files do not hold, and which begin at random."""
    return getattr(model, "_lowrank_new", ())


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is none on this machine, or this build of torch cannot use it.
    """
    try:
        device = torch.device(name)
        with suppress(torch.OutOfMemoryError):  # it is there
            torch.empty(1, device=device).to("cpu")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        why = "" if found else f" ({str(error).strip().splitlines()[0].partition('. ')[0].rstrip('.')[:100]})"
        raise InputError(
            f"there is no device {name!r} here{why}",
            where="model.device",
            fix=f"Take one of {', '.join(['cpu', *found])}, or leave it out.",
        ) from error
    return device


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Where it has no padding token, the end token or another special one pads.

    Neither masks nor labels look at what pads. A tokenizer without an end token has one in its chat template, or none.

    Raises:
        InputError: there is none, or it has no special token at all.
    """
    check_folder(name_or_path, holds_model=False)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library tokenizers raises nothing more exact
        raise cannot_load(f"the tokenizer of {name_or_path}", error) from error
    if tokenizer.pad_token_id is None:
        marked = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = [tokenizer.eos_token or "", *tokenizer.all_special_tokens, *marked]
        tokenizer.pad_token = next(filter(None, special), None)
        if tokenizer.pad_token_id is None:
            raise InputError(
                f"the tokenizer of {name_or_path} has neither a padding nor an end token, nor another special one",
                fix="Name one of its tokens in its tokenizer_config.json: eos_token.",
            )
    return tokenizer


def check_folder(name_or_path: str, *, holds_model: bool = True) -> None:
    """Raises InputError for what looks like a folder and is none; with `holds_model`, for one that holds no model."""
    path = Path(name_or_path)
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise InputError(
            f"there is no model folder {name_or_path}",
            fix="Give the folder of a saved model, or a name on the hub such as HuggingFaceTB/SmolLM2-135M-Instruct.",
        )
    if path.is_dir():
        _check_files(path)
    if not path.is_dir() or not holds_model:
        return
    if not (path / "config.json").exists():
        raise InputError(f"{name_or_path} is no model folder: it holds no config.json")
    weights = {suffix: any(path.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin", ".pt", ".pth")}
    if not weights[".safetensors"] and any(weights.values()):
        raise InputError(
            f"{name_or_path} holds its weights as pickles, which can run code when they are read; only safetensors are",
            fix="Convert it where you trust it: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new).",
        )


def _check_files(folder: Path) -> None:
    """Raises InputError for files that stand for others, and for JSON files that hold no object."""
    for file in sorted(folder.glob("*")):
        if file.suffix not in (".json", ".safetensors", ".model", ".jinja", ".txt") or not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"{file} is a Git LFS pointer: the text that stands for a file that was not fetched",
                    fix=f"Fetch it: git -C {folder} lfs pull.",
                )
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", _INDEX):
        if (folder / name).is_file():
            try:
                value = json.loads((folder / name).read_bytes())
            except ValueError as error:
                raise InputError(f"{folder / name} is not valid JSON: {error}") from None
            if not isinstance(value, dict):
                raise InputError(f"{folder / name} holds no JSON object but a {type(value).__name__}")
            _check_ends(value.get("eos_token_id"), folder / name)


def _check_ends(ends: Any, file: Path) -> None:
    tokens = ends if isinstance(ends, list) else [ends]
    if ends is not None and not all(type(token) is int for token in tokens):
        raise InputError(f"eos_token_id is {ends!r} in {file}", fix="It is the number of a token, or a list of such.")


def cannot_load(what: str, error: Exception) -> InputError:
    """What a person is told where transformers could not load."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return InputError(
            f"{what} brings Python code of its own, which is not run unasked",
            fix="Read that code; if you trust it, set model.trust_remote_code: true (or --trust-remote-code).",
        )
    if "untagged enum" in lines[0]:
        return InputError(
            f"{what} is of a kind that the installed library tokenizers {tokenizers.__version__} does not know",
            fix="Bring tokenizers and transformers up to date, or save the tokenizer again with what it was made with.",
        )
    if "connect" in lines[0]:
        return InputError(
            f"{what} is no folder here, and the hub cannot be reached",
            fix="Is the name right? Without a hub, give the folder of a saved model.",
        )
    whole = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]
    return InputError(f"{what} cannot be loaded: {whole}")


def vocabulary_of(model: PreTrainedModel) -> int:
    """Rows of the model's input embedding: token ids are below."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have where positions are looked up in a table; None where they are computed.

    GPT-2, OPT and their like learn a vector for each position; GPT-J, CodeGen and CTRL hold a table of sines; MPT's
    bias is built for so many. Beyond it they end in an IndexError.
    """
    config = model.config.get_text_config()
    if config.model_type == "mpt":
        return int(config.max_seq_len)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    found = [getattr(module, name, None) for module in model.modules() for name in _TABLES]
    tables = [getattr(each, "weight", each) for each in found if not hasattr(each, "make_weights")]  # XGLM's grow
    rows = {len(table) for table in tables if isinstance(table, torch.Tensor) and table.ndim == 2}
    if not rows & {positions, positions + 2}:
        return None
    pads = [one.padding_idx for one in found if isinstance(one, torch.nn.Embedding) and one.padding_idx is not None]
    return min([positions, *(max(rows) - pad - 1 for pad in pads)])  # RoBERTa's count on from the one that pads
