"""What a person is told about a config that cannot be used: exact texts, all mistakes at once, each with its line."""

from __future__ import annotations

import pickle
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank.config import ConfigError, RunConfig, load_config
from lowrank.config.keys import SECTIONS
from lowrank.config.sections import adapter_sections
from lowrank.config.synonyms import SYNONYMS

IN_ADAPTER = [
    ("r: four", "adapter.r: 'four' is not a whole number of at least 1"),
    ("r: 0", "adapter.r: 0 is not a whole number of at least 1"),
    ("r: 16.5", "adapter.r: 16.5 is not a whole number of at least 1"),
    ("r: true", "adapter.r: true is not a whole number of at least 1"),
    ("r:", "adapter.r: is empty; it takes a whole number of at least 1"),
    ("lora_dropout: 1", "adapter.lora_dropout: 1 is not a number of at least 0 and below 1"),
    ("lora_alpha: .inf", "adapter.lora_alpha: .inf is not a number above 0"),
    ("lora_rank: 4", "adapter.lora_rank: is adapter.r here"),
    ("lora_target_linear: true", "adapter.lora_target_linear: is adapter.target_modules: all-linear here"),
    ("lora_aplha: 4", "adapter.lora_aplha: is not known; did you mean lora_alpha?"),
    ("learning_rates: 4", "adapter.learning_rates: is not known; did you mean training.learning_rate?"),
    ("init_r: 4", "adapter.init_r: belongs to adapter.method: adalora"),
    ("load_in_4bit: true", "adapter.load_in_4bit: belongs under `quantization:`"),
    ("method: lorra", "adapter.method: 'lorra' is no method; it is one of lora, dora, adalora, miss, vera, full, bias"),
    (
        "method: [lora]",
        "adapter.method: ['lora'] is no method; it is one of lora, dora, adalora, miss, vera, full, bias",
    ),
    ("method:", "adapter.method: is empty; it is one of lora, dora, adalora, miss, vera, full, bias"),
    ("target_modules: 3", 'adapter.target_modules: 3 is not a list of texts or a text (in quotes it is one: "3")'),
    ("target_modules: [q_proj, 3]", 'adapter.target_modules[1]: 3 is not a text (in quotes it is one: "3")'),
    ("rank_pattern: {q_proj: x, k_proj: 3}", "adapter.rank_pattern.q_proj: 'x' is not a whole number"),
    ("rank_pattern: {q_proj: 0}", "adapter.rank_pattern: gives 'q_proj' the rank 0; a rank is at least 1"),
    ("eva_config: {rhoo: 1}", "adapter.eva_config.rhoo: is not known; did you mean rho?"),
    ("eva_config: {rho: 2}", "adapter.eva_config: is set, and init_lora_weights is not eva"),
    (
        "init_lora_weights: pisa",
        "adapter.init_lora_weights: 'pisa' is not true or false, one of gaussian, orthogonal, pissa, olora, loftq, eva, "
        "or a text like pissa_niter_[1-9][0-9]*; did you mean pissa?",
    ),
    ("layers_pattern: h", "adapter.layers_pattern: says where layer numbers stand, and layers_to_transform gives none"),
    (
        "method: qlora",
        "adapter.method: QLoRA is LoRA over a quantised base: adapter.method: lora and quantization.load_in_4bit: true",
    ),
]


@pytest.mark.parametrize(("line", "message"), IN_ADAPTER, ids=[line for line, _ in IN_ADAPTER])
def test_a_mistake_in_the_adapter_section(told, good, line, message):
    assert told(good.replace("r: 4", line)) == [f"run.yaml:4: {message}"]


IN_TRAINING = [
    ("micro_batch_size: 2", "micro_batch_size: is training.per_device_train_batch_size here"),
    ("max_length: 5", "max_length: belongs under `data:`"),
    ("r: 3", "r: belongs under `adapter:`"),
    (
        "overwrite_output_dir: true",
        "overwrite_output_dir: is not needed here: a run never overwrites another; give another training.output_dir",
    ),
    ("lr_scheduler_type: cosin", "lr_scheduler_type: 'cosin' is not one of cosine, cosine_with_min_lr, linear, constant, inverse_sqrt, warmup_stable_decay; did you mean cosine?"),
    ("lr_scheduler_type: no", "lr_scheduler_type: 'no' is not one of cosine, cosine_with_min_lr, linear, constant, inverse_sqrt, warmup_stable_decay"),
    ("lr_scheduler_type: true", "lr_scheduler_type: true is not one of cosine, cosine_with_min_lr, linear, constant, inverse_sqrt, warmup_stable_decay"),
    ("gradient_checkpointing: maybe", "gradient_checkpointing: 'maybe' is not true or false or one of selective, offload"),
    ("num_train_epochs: true", "num_train_epochs: true is not a number above 0"),
    ("learning_rate: .nan", "learning_rate: .nan is not a number above 0"),
    ("eval_steps: None", "eval_steps: None is a text in YAML; write null, or leave the key out"),
    ("max_steps: 0", "max_steps: is 0; write a number of steps from 1 on, or -1 for num_train_epochs"),
    ("parameter_groups: [{}]", "parameter_groups[0].pattern: is missing: a regular expression that is searched for in the parameter's name"),
    ("parameter_groups: [{patern: x}]", "parameter_groups[0].patern: is not known; did you mean pattern?"),
    ("output_dir: other", "output_dir: stands at run.yaml:8 already"),
    ("<<: 3", "<<: merges mappings alone, such as `<<: *name`"),
    ("<<: {sed: 3}", "sed: is not known; did you mean seed?"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), IN_TRAINING, ids=[line for line, _ in IN_TRAINING])
def test_a_mistake_in_the_training_section(told, good, line, message):
    assert told(f"{good}  {line}\n") == [f"run.yaml:9: training.{message}"]


@pytest.mark.parametrize(
    ("there", "instead", "message"),
    [
        ("data:\n  train: rows.jsonl\n", "", "run.yaml: data: is missing: what it is trained on"),
        ("data:\n  train: rows.jsonl", "data:", "run.yaml:5: data: is empty; its keys go below it, one a line"),
        ("  train: rows.jsonl", "  max_length: 9", "run.yaml:5: data.train: is missing: the training data: a file or a folder "
         "(relative to the current folder), or a name on the hub"),
        ("  train: rows.jsonl", "  dataset: x", "run.yaml:6: data.dataset: is data.train here"),
        ("data:", "dta:", "run.yaml:5: dta: is not known; did you mean data?"),
        ("  train: rows.jsonl", "  trian: x", "run.yaml:6: data.trian: is not known; did you mean train?"),
        ("  train: rows.jsonl", "  train: 2024", 'run.yaml:6: data.train: 2024 is not a text or a list of texts or mappings with path, format, weight, split, subset, columns (in quotes it is one: "2024")'),
        ("model:\n  name_or_path: base", "model: base", "run.yaml:1: model: 'base' is no section; its keys go below it, one a line: "
         "model.name_or_path: base"),
        ("adapter:\n  r: 4", "adapter: dora", "run.yaml:3: adapter: 'dora' is no section; its keys go below it, one a line: "
         "adapter.method: dora"),
        ("adapter:\n  r: 4", "adapter:", "run.yaml:3: adapter: is empty; name a method: lora, dora, adalora, miss, vera, full, bias (full trains "
         "every weight)"),
        ("  r: 4", "  method: full\n  r: 4", "run.yaml:5: adapter.r: belongs to adapter.method: lora or dora or miss or vera"),
        ("  r: 4", "  method: dora\n  use_dora: false", "run.yaml:5: adapter.use_dora: false is not true"),
        ("  r: 4", "  method: adalora\n  target_r: 20", "run.yaml:5: adapter.target_r: 20 is above init_r (12): ranks only shrink"),
    ],
)  # fmt: skip
def test_a_mistake_elsewhere(told, good, there, instead, message):
    assert told(good.replace(there, instead)) == [message]


def test_all_mistakes_at_once_in_the_order_of_the_lines_and_overrides_last(told, good):
    text = good.replace("r: 4", "rank: 4\n  bias: some").replace("output_dir: out", "output_dir: out\n  eval_steps: 3")
    text = text.replace("train: rows.jsonl", "train: rows.jsonl\n  max_length: 1")
    assert told(text, "training.seed=x", "model.dtype=bf16") == [
        "run.yaml:4: adapter.rank: is adapter.r here",
        "run.yaml:5: adapter.bias: 'some' is not one of none, all, lora_only",
        "run.yaml:8: data.max_length: 1 is not a whole number of at least 2",
        "run.yaml:11: training.eval_steps: there is nothing to evaluate: data.eval is not set",
        "--set model.dtype: 'bf16' is not one of auto, bfloat16, float16, float32; did you mean bfloat16?",
        "--set training.seed: 'x' is not a whole number",
    ]


def test_a_contradiction_that_rests_on_a_mistake_is_not_told(told, good):
    text = good.replace("train: rows.jsonl", "train: rows.jsonl\n  eval: 3") + "  eval_steps: 3\n"
    assert told(text) == [
        'run.yaml:7: data.eval: 3 is not a text, a number above 0 and below 1, or a list of texts or mappings with path, format, weight, split, subset, columns (in quotes it is one: "3")'
    ]


def test_long_values_are_cut(told, good):
    [line] = told(good.replace("r: 4", f"r: {'x' * 200}"))
    assert line == f"run.yaml:4: adapter.r: '{'x' * 56}... is not a whole number of at least 1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.lora_rank=3", "--set adapter.lora_rank: is adapter.r here"),
        ("seed=3", "--set seed: belongs under `training:`"),
        ("adapter.r", "--set adapter.r: write section.key=value, such as training.learning_rate=1e-4"),
        ("training..seed=3", "--set training..seed=3: write section.key=value, such as training.learning_rate=1e-4"),
        ("data.train=[a", "--set data.train: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "model.dtype.x=3",
            "--set model.dtype.x: model.dtype: {'x': 3} is not one of auto, bfloat16, float16, float32",
        ),
        ("adapter.r.x=3", "--set adapter.r.x: adapter.r: is no section"),
        ("training.learning_rate=", "--set training.learning_rate: is empty; it takes a number above 0"),
    ],
)
def test_a_mistake_in_an_override(told, good, override, message):
    assert told(good, override) == [message]


def test_the_error_survives_a_process_border(told, good):
    with pytest.raises(ConfigError) as raised:
        load_config("none.yaml")
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.problems) == (str(raised.value), raised.value.problems)


METHODS = adapter_sections()
KEYS = sorted({key for model in (*SECTIONS.values(), *METHODS.values()) for key in model.model_fields})
WORDS = [*METHODS, "all-linear", "eva", "loftq", "None", "no", "1e-4", ""]
names = st.sampled_from([*KEYS, *RunConfig.model_fields, *SYNONYMS, "rho", "x", "<<"])
leaves = st.one_of(st.none(), st.booleans(), st.integers(-1, 9), st.floats(), st.sampled_from(WORDS))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
sections = st.one_of(values, st.dictionaries(names, values, max_size=6))


@given(
    written=st.fixed_dictionaries({}, optional=dict.fromkeys([*RunConfig.model_fields, "lora_r", "x"], sections)),
    method=st.sampled_from([*METHODS, "x"]),
    assignments=st.lists(st.tuples(st.sampled_from(list(RunConfig.model_fields)), names, values), max_size=2),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_written_is_a_config_or_a_list_of_mistakes(load, written, method, assignments):
    if isinstance(written.get("adapter"), dict):
        written["adapter"].setdefault("method", method)
    overrides = [
        f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True)}" for section, key, value in assignments
    ]
    found = ()
    try:
        load(yaml.safe_dump(written), *overrides)
    except ConfigError as error:
        found = error.problems
    for problem in found:
        assert problem.where.startswith(("run.yaml", "--set "))
        assert problem.what
        assert not re.search("Section|function-|Field required|Input should", str(problem))
