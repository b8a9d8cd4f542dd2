"""`README.md` of a run's adapter: what the hub shows of it, made from the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from lowrank.adapters import method_of
from lowrank.config import RunConfig
from lowrank.config.sections import AdapterSection, DataSection, MethodSection, ModelSection
from lowrank.recipes.parts.prepare import adapter_config
from lowrank.storage.whole_file import write_whole
from lowrank.tasks.kinds_of_task import TASK_KINDS, Kind
from lowrank.tasks.task import Task
from lowrank.training.callbacks.run_report import comparison
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.weights.cards import FILE, may_write, signed
from lowrank.weights.upload import is_hub_name

_SHOWN = ("adapter", "trainable", "dtype", "batches", "steps")
_METRICS = {"loss": "Loss per supervised token", "perplexity": "Perplexity", "exact_match": "Exact match"}
_CAUSAL = Kind("AutoModelForCausalLM", "CAUSAL_LM", "text-generation", ())
_TEXT = Template("""# $title

An adapter ($method) for $base, trained with lowrank.

## Use

```python
from peft import PeftModel
from transformers import $auto_class, AutoTokenizer

adapter = "$title"  # this folder, or the repository's name on the hub
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = $auto_class.from_pretrained($base_name)
model = PeftModel.from_pretrained(model, adapter)
```

${transformers}With lowrank, which `lowrank $verb` also asks it with:

```python
import lowrank

model = $auto_class.from_pretrained($base_name)
model = lowrank.load(model, adapter)
```

## Training

$training
$results""")

_TRANSFORMERS = Template("""With transformers' own adapters:

```python
model = $auto_class.from_pretrained($base_name)
model.load_adapter(adapter)
```

""")


def write_card(
    folder: Path,
    config: RunConfig,
    summary: Mapping[str, str],
    rows: str,
    before: Evaluation | None,
    after: Evaluation | None,
    task: Task | None = None,
) -> bool:
    """Writes the card of a run's adapter, unless a person has written or changed the one that is there.

    Args:
        folder: Of the run.
        config: Of the run.
        summary: What the run did, line by line, as it was shown before it began.
        rows: What of the data was trained on: rows, tokens.
        before: The base's evaluation.
        after: The adapter's.
        task: What was learned, None for the next token.

    Returns:
        Whether the folder's card is this one.

    Raises:
        OSError: it cannot be written.
    """
    if not may_write(folder):
        return False
    title, base, revision = folder.resolve().name, config.model.name_or_path, config.model.revision
    kind = _CAUSAL if task is None else TASK_KINDS[task.name]
    front = _front(config.model, config.adapter.method, config.data, title, after, kind.pipeline)
    on_hub = is_hub_name(base)
    name = base if on_hub else Path(base).name
    shown = _SHOWN if task is None else ("task", *_SHOWN)
    told = [("data", f"{_sources(config.data.train)}: {rows}"), *((key, summary[key]) for key in shown)]
    base_name = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    loading = {"base_name": base_name + _labels(task), "auto_class": kind.auto_class}
    text = _TEXT.substitute(
        loading,
        verb="chat" if task is None else "predict",
        title=title,
        method=config.adapter.method,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{name}`",
        transformers=_TRANSFORMERS.substitute(loading) if _is_plain(config.adapter) else "",
        training=_table(("", ""), told),
        results=_results(config.data, before, after),
    )
    write_whole(folder / FILE, signed(f"---\n{front.to_yaml()}\n---\n\n{text}"))
    return True


def _labels(task: Task | None) -> str:
    """What the base is loaded with: as many outputs as there are labels."""
    names = {} if task is None else task.settings
    count = names.get("num_labels") or len(names.get("id2label", ()))
    return f", num_labels={count}" if count else ""


def _is_plain(adapter: AdapterSection) -> bool:
    """Whether `load_adapter` of transformers gives the same: DoRA comes out as another model, AdaLoRA is refused."""
    return isinstance(adapter, MethodSection) and method_of(adapter_config(adapter)).in_transformers


def _front(
    model: ModelSection, method: str, data: DataSection, title: str, after: Evaluation | None, pipeline: str
) -> ModelCardData:
    base = model.name_or_path
    known: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if is_hub_name(base) else {}
    return ModelCardData(
        **known,
        **license_of(base, model.revision),
        library_name="peft",
        pipeline_tag=pipeline,
        tags=["lowrank", method],
        model_name=title if after is not None else None,
        eval_results=None if after is None else _eval_results(data, after, pipeline),
    )


def license_of(base: str, revision: str | None) -> dict[str, Any]:
    """What the base's own card says of it, as far as that lies here; nothing is fetched."""
    place: Any = Path(base) / FILE
    if not Path(base).is_dir():
        place = try_to_load_from_cache(base, FILE, revision=revision) if is_hub_name(base) else None
    if not isinstance(place, (str, Path)) or not Path(place).is_file():
        return {}
    try:
        data = ModelCard.load(place, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, yaml.YAMLError):  # not a card of the hub's form: it says nothing
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}


def _eval_results(data: DataSection, after: Evaluation, pipeline: str) -> list[EvalResult]:
    name = _data_name(data)
    measured = {metric: (what, getattr(after, metric)) for metric, what in _METRICS.items()}
    if after.scores is not None:
        measured = {"loss": ("Loss", after.loss), **{metric: (metric, value) for metric, value in after.scores.items()}}
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=what,
            metric_value=round(value, 6),
        )
        for metric, (what, value) in measured.items()
        if value is not None
    ]


def _data_name(data: DataSection) -> str:
    """What was evaluated on, without the folders of this machine."""
    if isinstance(data.eval, float):
        return f"{data.eval:.3g} of {_sources(data.train)}"
    return _sources(data.eval)


def _sources(given: Any) -> str:
    """The names of the sources of a data section's `train` or `eval`."""
    paths = [getattr(source, "path", source) for source in (given if isinstance(given, list) else [given])]
    return ", ".join(path if is_hub_name(path) else Path(path).name for path in map(str, paths))


def _results(data: DataSection, before: Evaluation | None, after: Evaluation | None) -> str:
    rows = comparison(before, after)
    if not rows:
        return ""
    return f"\n## Results on {_data_name(data)}\n\n{_table(('', 'before', 'after'), rows)}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
