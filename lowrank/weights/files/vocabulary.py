"""A model's vocabulary in an adapter's file: the rows of embedding and head where training changed their number.

Rows that `resize_token_embeddings` added are the base's, and no checkpoint of it holds them; so an adapter's file
brings them along, as peft's does.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import PreTrainedModel

from lowrank.adapters.install import AdapterSet, Layer
from lowrank.adapters.record import find_record
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.token_rows import SharedTokens, TokenRows, find_token_places
from lowrank.adapters.whole_modules import WholeCopy
from lowrank.storage.tensorfile import Entry, TensorFile
from lowrank.weights.files.adapter_file import TOKENS, AdapterFile
from lowrank.weights.files.fingerprint import text_config

_ROWS = 4096  # that are read at once


def vocabulary_ends(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a row for each token, by path: the embedding, then the head. Empty for models without words."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Embedding | nn.Linear) and module.weight is not None:
            found.append(module)
    if not any(isinstance(module, nn.Embedding) for module in found):
        return {}  # a patch embedding and its like: rows are no tokens
    return {path: module for path, module in model.named_modules() for end in found if module is end}


def _was_resized(model: nn.Module) -> bool:
    """Whether the model has another number of tokens than the checkpoint that it was loaded from, or was built with."""
    if not isinstance(model, PreTrainedModel) or not vocabulary_ends(model):
        return False
    now = getattr(text_config(model.config), "vocab_size", None)
    before = _vocabulary_of_checkpoint(model)
    if before is not None:
        return before != now
    # Modules note their number when they are built; a resize renews the note of the outermost one alone, or makes one.
    noted = {module.__dict__.get("vocab_size") for module in model.modules() if isinstance(module, PreTrainedModel)}
    stale = {size for size in noted if isinstance(size, int)} - {now}
    return bool(stale) or ("vocab_size" in model.__dict__ and not _notes_its_vocabulary(type(model)))


def _notes_its_vocabulary(cls: type[PreTrainedModel]) -> bool:
    """Whether building a model of this class sets `vocab_size` on it."""
    return "self.vocab_size" in inspect.getsource(cls.__init__)


def _vocabulary_of_checkpoint(model: PreTrainedModel) -> int | None:
    name = model.config._name_or_path
    if not name:
        return None
    file: object = Path(name) / "config.json"
    if not (isinstance(file, Path) and file.is_file()):
        try:
            file = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
    if not isinstance(file, str | Path):
        return None
    try:
        config = type(model.config).from_pretrained(Path(file).parent)
    except (OSError, ValueError):
        return None
    return getattr(text_config(config), "vocab_size", None)


def rows_to_save(model: nn.Module, adapter: str, always: bool = False) -> dict[str, torch.Tensor]:
    """The base's own embedding and head under peft's names, where they were resized, or always; a tied one once."""
    if not always and not _was_resized(model):
        return {}
    saved: dict[str, nn.Parameter] = {}
    for path in vocabulary_ends(model):
        module, prefix = model.get_submodule(path), _prefix_in_file(model, path, adapter)
        for name, parameter in module.named_parameters(recurse=False):
            if prefix is not None and not any(parameter is other for other in saved.values()):
                saved[f"{prefix}.{name}"] = parameter
    return {name: parameter.detach() for name, parameter in saved.items()}


def _prefix_in_file(model: nn.Module, path: str, adapter: str) -> str | None:
    """None where the adapter holds the module whole, or what it stands in: the name is the trained copy's."""
    if any(isinstance(_layer(model.get_submodule(one), adapter), WholeCopy) for one in _up(path)):
        return None
    layer = _layer(model.get_submodule(path), adapter)
    if layer is None or isinstance(layer, SharedTokens):
        return path
    return f"{path}.token_adapter.base_layer" if isinstance(layer, TokenRows) else f"{path}.base_layer"


def _layer(module: nn.Module, adapter: str) -> Layer | None:
    adapters = module._modules.get(AdapterSet.CHILD)
    return adapters.layers().get(adapter) if isinstance(adapters, AdapterSet) else None


def _up(path: str) -> list[str]:
    """The path of a module and of all that it stands in."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


@dataclass(frozen=True, slots=True)
class BaseRows:
    """Rows of the base's own embedding or head in an adapter's file that differ from a model's.

    Attributes:
        weight: The model's parameter.
        places: (n,), which rows.
        values: (n, width), the file's.
    """

    weight: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor

    @torch.no_grad()
    def put_in(self) -> BaseRows:
        """Writes the rows into the model; what is returned brings the old ones back."""
        before = self.weight.data[self.places].clone()
        self.weight.data[self.places] = self.values.to(self.weight)
        return BaseRows(self.weight, self.places, before)


def base_tensors(model: nn.Module, file: AdapterFile) -> dict[str, nn.Parameter]:
    """The file's tensors that are the base's own embedding or head, with the model's parameters."""
    found, ends = {}, vocabulary_ends(model)
    names_of_wholes = file.config.modules_to_save or []
    wholes = {path for path in ends if any(matches_end(one, name) for one in _up(path) for name in names_of_wholes)}
    if getattr(file.config, "ensure_weight_tying", False) and wholes:
        wholes = set(ends)  # what is tied is trained whole together
    for path, module in ends.items():
        whole = path in wholes
        for own, parameter in module.named_parameters(recurse=False):
            if own == "bias" and file.config.bias != "none":
                continue
            names = (f"{path}.base_layer.{own}", f"{path}.{own}")[: 1 if whole else 2]
            found |= {name: parameter for name in names if name in file.tensors}
    return found


def tied_tokens(model: nn.Module, file: AdapterFile) -> set[str]:
    """Trained rows that peft's file holds a second time, for a head that follows the embedding that it is tied to."""
    ends = list(vocabulary_ends(model).items())
    if len(ends) < 2 or getattr(ends[0][1], "weight", None) is not getattr(ends[1][1], "weight", None):
        return set()
    (embedding, _), (head, _) = ends
    if head in find_token_places(model, file.config):
        return set()
    return {f"{head}{TOKENS}"} if {f"{embedding}{TOKENS}", f"{head}{TOKENS}"} <= file.tensors.keys() else set()


def new_rows(model: nn.Module, file: AdapterFile) -> tuple[list[BaseRows], list[str]]:
    """The rows of new tokens that the file brings and a resize of the model made up anew; and what does not fit."""
    rows, problems = [], []
    known = _vocabulary_of_checkpoint(model) if isinstance(model, PreTrainedModel) else None
    for name, parameter in base_tensors(model, file).items():
        found = _differing(name, parameter, file, known)
        if isinstance(found, BaseRows) and find_record(model) is not None:
            found = f"{name} has rows that differ from the model's, whose other adapters belong to those"
        if isinstance(found, str):
            problems.append(found)
        elif found is not None:
            rows.append(found)
    return rows, problems


def _differing(name: str, weight: nn.Parameter, file: AdapterFile, known: int | None) -> BaseRows | str | None:
    """Where the file's rows are not the model's; in words where known tokens' differ, for then the base does."""
    shape = file.tensors[name].shape
    if tuple(weight.shape) != shape:
        resize = f"; call model.resize_token_embeddings({shape[0]}) first" if shape[1:] == weight.shape[1:] else ""
        return f"{name} is {list(shape)} (here {list(weight.shape)}{resize})"
    rows, own = file.read(name), weight.detach().cpu()
    coarser = max(torch.finfo(rows.dtype).eps, torch.finfo(own.dtype).eps)
    same = torch.isclose(rows.float(), own.float(), rtol=2 * coarser, atol=0.0).view(len(own), -1).all(1)
    places = (~same).nonzero().flatten()
    if not len(places):
        return None
    if places[0] < (known if known is not None else (len(same) + 1) // 2):
        return f"another base: {name} differs in {len(places)} of {len(same)} rows"
    return BaseRows(weight, places.to(weight.device), rows[places])


def mean_row(file: TensorFile, entry: Entry) -> torch.Tensor:
    """The mean of a table's rows, float32."""
    total = torch.zeros(entry.shape[1:])
    for first in range(0, entry.shape[0], _ROWS):
        total += file.read_rows(entry.name, first, min(first + _ROWS, entry.shape[0])).float().sum(0)
    return total / max(1, entry.shape[0])


def padded_rows(file: TensorFile, entry: Entry, width: int, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` (not included), cut or filled up with zeros to a width."""
    rows = file.read_rows(entry.name, first, last)
    padded = rows.new_zeros(last - first, width)
    shared = min(width, entry.shape[1])
    padded[:, :shared] = rows[:, :shared]
    return padded
