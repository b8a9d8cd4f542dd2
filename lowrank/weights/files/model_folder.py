"""A model folder: its shards' headers, its architecture without weights, and where each tensor belongs in the model.

The architecture is built on the meta device, so that module kinds, shapes and ties are transformers' own and not
guessed from names; a 70B model takes less than a second and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lowrank.errors import InputError
from lowrank.paths import hub_commit
from lowrank.quantisers.registry import quantiser_named
from lowrank.storage.hub import local_folder
from lowrank.storage.tensorfile import TensorFile, open_tensors
from lowrank.weights.files.adapter_file import read_json, shorten
from lowrank.weights.files.fingerprint import text_config
from lowrank.weights.files.names import Placement, find_pieces

_COUNTED = ("num_", "n_", "encoder_layers", "decoder_layers")  # keys that count layers begin so
_MOST_LABELS = 10_000_000
_HEADS = ("Classification", "QuestionAnswering")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that a model shall have instead of those in its config; None for the config's.

    Attributes:
        vocabulary: Rows of embedding and head.
        labels: Of a classifier.
    """

    vocabulary: int | None = None
    labels: int | None = None


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        config: The folder's, with `sizes`.
        skeleton: The architecture on the meta device, ties made.
        files: The shards' headers by file name, in the order of their names.
        sharded: Whether the folder has an index.
        pieces: Tensor name in the files -> which parts of which parameters it holds.
    """

    folder: Path
    config: PretrainedConfig
    skeleton: PreTrainedModel
    files: dict[str, TensorFile]
    sharded: bool
    pieces: dict[str, list[Placement]]
    sizes: Sizes = Sizes()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the files are quantised; a whole model's config may say it of a part. None for a dense model."""
        return _quantization(self.config)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for file in self.files.values() for entry in file.entries.values())

    def untied(self, name: str) -> str:
        """The parameter that `name` is tied to, or `name` itself."""
        return self.skeleton.all_tied_weights_keys.get(name, name)


def open_base(
    name_or_path: str | Path,
    task_type: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    *,
    model_class: str | None = None,
    sizes: Sizes = Sizes(),
) -> ModelFolder:
    """Opens a local folder, or a hub's model (downloaded to the hub's cache when it is not there).

    Args:
        name_or_path: A folder or a hub name.
        task_type: peft's word for the head ("CAUSAL_LM"); None takes the class that the config names.
        trust_remote_code: Whether code that comes with the model may run.
        revision: Of a hub's repository.
        model_class: A class of transformers, before what the config names, where it takes such a config.
        sizes: Sizes other than the config's; the files' tensors keep theirs.

    Raises:
        InputError: There is no such model, it has no safetensors, or they are damaged or do not fit the config.
    """
    folder = local_folder(name_or_path, revision=revision)
    files, sharded = _open_files(folder)
    config = load_config(folder, trust_remote_code)
    quantiser = quantiser_named((_quantization(config) or {}).get("quant_method"))
    if quantiser is not None:
        files = {name: quantiser.named(file) for name, file in files.items()}
    _check_depth(config.to_dict(), sum(len(file.entries) for file in files.values()), folder)
    _resize(config, sizes)
    skeleton = _skeleton(folder, config, _named_class(model_class, config), task_type, trust_remote_code)
    names = [name for file in files.values() for name in file.entries]
    shapes = {name: entry.shape for file in files.values() for name, entry in file.entries.items()}
    if len(shapes) < len(names):
        raise InputError("a tensor's name occurs in two of the model's files", where=str(folder))
    return ModelFolder(folder, config, skeleton, files, sharded, find_pieces(skeleton, shapes), sizes)


def _quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _resize(config: PretrainedConfig, sizes: Sizes) -> None:
    if sizes.vocabulary is not None:
        text_config(config).vocab_size = sizes.vocabulary
    if sizes.labels is not None:
        for part in {id(part): part for part in (config, text_config(config))}.values():
            part.num_labels = sizes.labels


def _named_class(name: str | None, config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig] | None:
    """transformers' class of that name with the config that it takes: the whole one, or a classifier its text part's.

    Any other text class is built as the whole model, whose names the files have.
    """
    cls = getattr(transformers, name, None) if name is not None else None
    if name is None or not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or cls.config_class is None:
        return None
    parts = [config, text_config(config)] if name.endswith(_HEADS) else [config]
    return next(((cls, part) for part in parts if isinstance(part, cls.config_class)), None)


def load_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config; InputError when it is missing or damaged."""
    path = folder / "config.json"
    labels = read_json(path).get("num_labels")
    if isinstance(labels, int) and labels > _MOST_LABELS:  # transformers would name each of them
        raise InputError(f"the config has num_labels {labels}", where=str(path))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged value can fail anywhere in transformers
        raise InputError(f"the model's config cannot be used: {_first_line(error)}", where=str(path)) from error
    config._commit_hash = hub_commit(folder)
    return config


def _check_depth(config: object, tensors: int, folder: Path) -> None:
    """A damaged number of layers would build an architecture for hours: each layer has a tensor in the files."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        counted = isinstance(key, str) and key.startswith(_COUNTED) and "layer" in key
        if counted and isinstance(value, int) and value > tensors:
            raise InputError(
                f"the config has {key} {value}, and the files hold {tensors} tensors",
                where=str(folder / "config.json"),
            )
        _check_depth(value, tensors, folder)


def _skeleton(
    folder: Path,
    config: PretrainedConfig,
    wanted: tuple[type[PreTrainedModel], PretrainedConfig] | None,
    task_type: str | None,
    trust: bool,
) -> PreTrainedModel:
    try:
        named = (config.architectures or [None])[0]
        architecture = getattr(transformers, named, None) if isinstance(named, str) else None
        known = isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
        with torch.device("meta"):
            if wanted is not None:
                model = wanted[0](wanted[1])
            elif task_type in _AUTO and not (named and _same_head(named, task_type)):
                model = _AUTO[task_type].from_config(config, trust_remote_code=trust)
            elif known:
                model = architecture(config)
            else:
                model = _AUTO["CAUSAL_LM"].from_config(config, trust_remote_code=trust)
        model.tie_weights()
    except Exception as error:  # see load_config
        raise InputError(
            f"no model can be built from the config: {_first_line(error)}", where=str(folder / "config.json")
        ) from error
    return model


def _first_line(error: Exception) -> str:
    """A message that fits on a line; the error's class stands for one that says too little."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if len(line) > 20 else f"{type(error).__name__} {line}".strip()


def _same_head(architecture: str, task_type: str) -> bool:
    ends = {
        "CAUSAL_LM": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
        "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
        "SEQ_CLS": ("ForSequenceClassification",),
        "TOKEN_CLS": ("ForTokenClassification",),
        "QUESTION_ANS": ("ForQuestionAnswering",),
        "FEATURE_EXTRACTION": ("Model",),
    }
    return architecture.endswith(ends[task_type])


def _open_files(folder: Path) -> tuple[dict[str, TensorFile], bool]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            pickles = [file.name for file in folder.glob("*.bin")]
            reason = (
                f"only pickles ({shorten(pickles)}), which are not read" if pickles else f"no {SINGLE} and no {INDEX}"
            )
            raise InputError(f"the model folder has {reason}", where=str(folder))
        return {SINGLE: open_tensors(folder / SINGLE)}, False
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(_plain(name) for name in weight_map.values()):
        raise InputError("the index has no weight_map of plain file names", where=str(index))
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"files of the model are missing: {shorten(missing)}", where=str(folder))
    files = {name: open_tensors(folder / name) for name in names}
    lost = [tensor for tensor, name in weight_map.items() if tensor not in files[name].entries]
    if lost:
        raise InputError(f"the index lists tensors that their files do not hold: {shorten(lost)}", where=str(index))
    return files, True


def _plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\\" not in name
