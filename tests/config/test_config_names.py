"""The names that a config uses: those of the rooms it speaks for, and other tools' names for them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from typing import get_args

import pytest
import torch

from lowrank.attention import BACKENDS
from lowrank.config.document import Document
from lowrank.config.keys import SECTIONS, field_at
from lowrank.config.sections import adapter_sections
from lowrank.config.synonyms import ABSENT, SYNONYMS
from lowrank.config.type_words import allowed, options
from lowrank.data.reading.formats import FORMATS
from lowrank.data.supervision.choose_template import TEMPLATES
from lowrank.data.supervision.row_options import BadRows, TooLong, TrainOn
from lowrank.ops.dtypes import Dtype
from lowrank.tasks.kinds_of_task import TASK_KINDS
from lowrank.training.evaluation.best import GREATER_IS_BETTER
from lowrank.training.evaluation.comparisons import COMPARISONS
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.losses.objective_kinds import MEASURED
from lowrank.training.optimisers.schedule import SCHEDULES
from lowrank.training.optimisers.table import OPTIMIZERS
from lowrank.training.transforms.recompute_modes import RecomputeMode

METHODS = adapter_sections()
MODELS = {**SECTIONS, **{f"adapter.{method}": model for method, model in METHODS.items()}}
KEYS = {f"{section.partition('.')[0]}.{key}" for section, model in MODELS.items() for key in model.model_fields}


TABLES = {
    "model.attention": ["auto", *BACKENDS],
    "data.format": FORMATS,
    "data.too_long": get_args(TooLong),
    "data.train_on": get_args(TrainOn),
    "data.bad_rows": get_args(BadRows),
    "training.optim": OPTIMIZERS,
    "training.lr_scheduler_type": SCHEDULES,
    "training.exact_match": COMPARISONS,
    "training.metric_for_best_model": GREATER_IS_BETTER,
    "training.gradient_checkpointing": get_args(RecomputeMode),
}


@pytest.mark.parametrize("key", TABLES)
def test_the_words_are_those_of_the_rooms_in_their_order(key):
    section, name = key.split(".")
    assert options(SECTIONS[section].model_fields[name].annotation) == list(TABLES[key])


def test_dtypes_are_torchs():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in get_args(Dtype))


def test_the_chat_templates_that_are_told_are_those_that_come_with_the_package():
    told = SECTIONS["data"].model_fields["chat_template"].description.partition(";")[0]
    assert told.replace(" or ", ", ").split(", ") == list(TEMPLATES)
    folder = files("lowrank.data.supervision") / "templates"
    assert {path.name for path in folder.iterdir()} == {f"{name}.jinja" for name in TEMPLATES}


def test_what_an_evaluation_can_be_judged_by_is_measured():
    of_tasks = {name for kind in TASK_KINDS.values() for name in kind.metrics}
    assert set(GREATER_IS_BETTER) == of_tasks | {*MEASURED, "loss", "exact_match"}
    assert {"loss", "exact_match"} <= {field.name for field in fields(Evaluation)}


def test_a_new_line_in_a_table_is_a_name_in_the_config():
    """In a process of its own, in which the table has one more line before the config is read."""
    code = (
        "from lowrank.training.optimisers.table import OPTIMIZERS; OPTIMIZERS['mine'] = OPTIMIZERS['sgd']\n"
        "from lowrank.config.schema import json_schema; from lowrank.config import load_config\n"
        "assert '\"mine\"' in json_schema()\n"
        "sections = dict(model={'name_or_path': 'm'}, adapter={'r': 4}, data={'train': 'x'})\n"
        "load_config({**sections, 'training': {'output_dir': 'o', 'optim': 'mine'}})\n"
        "try: load_config({**sections, 'training': {'output_dir': 'o', 'optim': 'mien'}})\n"
        "except ValueError as error: raise SystemExit('did you mean mine?' not in str(error))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("section", MODELS)
def test_what_a_field_takes_can_be_said_in_words(section):
    for name, field in MODELS[section].model_fields.items():
        assert all(allowed(field.annotation, field.metadata)), name
        assert field.description, name


@pytest.mark.parametrize("name", SYNONYMS)
def test_other_tools_names_lead_to_keys_and_values_that_exist(name):
    key, _, value = SYNONYMS[name].partition(": ")
    if key.startswith("the section "):
        assert key.removeprefix("the section ").split()[0] in {"adapter", "quantization"}
        return
    assert key in KEYS
    word = value.partition(" ")[0]
    document = Document("run.yaml", {"adapter": {"method": "lora"}})
    field = field_at(tuple(key.split(".")), document)
    if word and key != "adapter.method" and field is not None and (known := options(field[0])):
        assert word in known or word.startswith("pissa_niter_")
    if key == "adapter.method" and word:
        assert word in METHODS


def test_no_name_of_ours_is_called_another_tools():
    ours = {key.partition(".")[2] for key in KEYS}
    assert ours.isdisjoint(SYNONYMS)
    assert ours.isdisjoint(ABSENT)
    assert set(SYNONYMS).isdisjoint(ABSENT)
    assert {get_args(model.model_fields["method"].annotation)[0] for model in METHODS.values()} == set(METHODS)


OTHER_TOOLS = {
    "axolotl": """\
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets: [{path: x, type: alpaca}]
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
adapter: qlora
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
num_epochs: 1
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
train_on_inputs: false
""",
    "LLaMA-Factory": """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
output_dir: saves/llama3-8b/lora/sft
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
warmup_ratio: 0.1
val_size: 0.1
""",
    "mlx-lm": """\
model: mlx_model
fine_tune_type: lora
data: /path/to/training/data
num_layers: 16
batch_size: 4
iters: 1000
steps_per_report: 10
steps_per_eval: 200
adapter_path: adapters
max_seq_length: 2048
grad_checkpoint: false
lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}
""",
    "Unsloth and TRL": """\
model_name: unsloth/llama-3-8b
max_seq_length: 2048
load_in_4bit: true
use_gradient_checkpointing: unsloth
random_state: 3407
dataset_name: trl-lib/Capybara
packing: true
assistant_only_loss: true
lora_target_modules: [q_proj]
torch_dtype: bfloat16
use_peft: true
max_steps: 60
""",
    "torchtune": """\
tokenizer: {path: x}
checkpointer: {checkpoint_dir: x}
dataset: {packed: false}
batch_size: 4
lr_scheduler: {num_warmup_steps: 100}
loss: {_component_: x}
epochs: 1
max_steps_per_epoch: null
clip_grad_norm: null
log_every_n_steps: 1
enable_activation_checkpointing: false
dtype: bf16
""",
}


@pytest.mark.parametrize("tool", OTHER_TOOLS)
def test_another_tools_config_is_answered_line_by_line(told, tool):
    text = OTHER_TOOLS[tool]
    lines = told(text)
    for number, line in enumerate(text.splitlines(), start=1):
        answers = [answer for answer in lines if answer.startswith(f"run.yaml:{number}: ")]
        assert len(answers) == 1, line
        assert "not known" not in answers[0]
