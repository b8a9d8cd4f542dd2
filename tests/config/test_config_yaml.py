"""YAML as it is read and written: the words of YAML 1.2, safely, and back."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank.config import ConfigError, RunConfig, dump_config, load_config
from lowrank.config.yamlcore import CoreDumper, CoreLoader


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("2E5", 2e5),
        ("-.5", -0.5),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("On", "On"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("12345e7", 12345e7),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_what_a_word_is(text, value):
    read = yaml.load(text, CoreLoader)
    assert (read, type(read)) == (value, type(value))


scalars = st.one_of(st.text(max_size=12), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())


@given(st.one_of(scalars, st.lists(scalars, max_size=3)))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back_the_same(value):
    text = yaml.dump({"key": value}, Dumper=CoreDumper, allow_unicode=True)
    assert yaml.load(text, CoreLoader) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}  # and by whoever follows YAML 1.1


@given(
    st.sampled_from(["1e-4", "no", "010", "1:30", "null", "2024-01-01", "0o7", "~", "<<", "=", ".inf", "a: b", "# x"])
)
def test_texts_that_look_like_something_else_get_quotes(text):
    written = yaml.dump([text], Dumper=CoreDumper)
    assert yaml.load(written, CoreLoader) == yaml.safe_load(written) == [text]


def test_booleans_may_be_yes_and_no_where_nothing_else_is_meant(load, good):
    config = load(good.replace("train: rows.jsonl", "train: rows.jsonl\n  packing: no"))
    assert config.data.packing is False


def test_a_number_in_scientific_notation_is_a_number(load, good):
    config = load(good + "  learning_rate: 5e-5\n", "training.adam_epsilon=1e-6")
    assert (config.training.learning_rate, config.training.adam_epsilon) == (5e-5, 1e-6)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


def test_anchors_aliases_and_merges(load, good):
    text = good.replace("r: 4", "r: &rank 4\n  lora_alpha: *rank\n  rank_pattern: &ranks {q_proj: 2, k_proj: 3}")
    text = text.replace("output_dir: out", "output_dir: out\n  <<: {seed: 7, output_dir: elsewhere}")
    text += "  report_to: &none none\n"
    config = load(text)
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.rank_pattern) == (
        4,
        4,
        {"q_proj": 2, "k_proj": 3},
    )
    assert (config.training.seed, config.training.output_dir) == (7, "out")
    several = good + "  <<: [{seed: 1}, {seed: 2, logging_steps: 3}]\n"
    assert (load(several).training.seed, load(several).training.logging_steps) == (1, 3)
    quoted = load(good.replace("r: 4", 'rank_pattern: {"<<": 3}'))
    assert quoted.adapter.rank_pattern == {"<<": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: holds no sections; a config begins with `model:`"),
        ("# nothing yet\n", "run.yaml: holds no sections; a config begins with `model:`"),
        ("- model\n", "run.yaml: holds no sections; a config begins with `model:`"),
        ("model: [\n", "run.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        ("model:\n\tname: x\n", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("model: {}\n---\nmodel: {}\n", "run.yaml:2: not valid YAML: but found another document"),
        ("model: &a [*a]\n", "run.yaml:1: not valid YAML: an alias stands inside of what it stands for"),
        ("model: *a\n", "run.yaml:1: not valid YAML: found undefined alias 'a'"),
        ("model: " + "[" * 3000 + "]" * 3000, "run.yaml: is nested too deeply"),
        (BOMB, "run.yaml:1: not valid YAML: aliases repeat too much"),
        (
            "model: \x00\n",
            "run.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed",
        ),
    ],
)
def test_what_is_no_config(told, text, message):
    assert told(text) == [message]


def test_nothing_is_ever_run(told, good, tmp_path):
    text = good.replace("r: 4", "r: !!python/object/apply:os.mkdir [made]") + "  seed: !!python/name:os.system 3\n"
    assert told(text) == [
        "run.yaml:4: adapter.r: the tag python/object/apply:os.mkdir is not supported",
        "run.yaml:9: training.seed: '3' cannot be read as python/name:os.system",
    ]
    assert not (tmp_path / "made").exists()


def test_a_key_that_is_no_word(told, good):
    assert "run.yaml:9: training: a key is a word, not a list or a mapping" in told(good + "  [a, b]: 3\n")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "none.yaml")
    none = tmp_path / "none.yaml"
    assert str(raised.value) == f"{none}: there is no such file; `lowrank init DATA {none}` writes one"
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_no_mistake(good, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + good.encode())
    assert load_config(tmp_path / "run.yaml").adapter.r == 4


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.target_modules=null", "adapter.target_parameters=[mlp.experts.gate_up_proj]"],
        ["adapter.rank_pattern={q_proj: 4, '^model.*k_proj': 2}", "adapter.alpha_pattern.q_proj=16"],
        ["adapter={method: dora, r: 2}", "data.packing=false", "training.per_device_train_batch_size=2"],
        ["adapter={method: adalora, init_r: 6, target_r: 3}", "quantization.load_in_4bit=true"],
        ["adapter={method: full}", "training.output_dir='1e-4'", "model.revision='no'"],
        ["adapter={method: bias}", "data.eval=rows.jsonl", "data.max_eval_rows=3"],
        ["quantization.load_in_8bit=true", "training.tokens_per_batch=4096"],
        ["adapter.init_lora_weights=eva", "adapter.eva_config.rho=1.5", "adapter.layers_to_transform=[1, 2]"],
    ],
    ids=" ".join,
)
def test_a_resolved_config_loads_as_the_same(load, good, overrides):
    config = load(good, *overrides)
    assert load(dump_config(config)) == config
    assert RunConfig.model_validate(config.model_dump()) == config


@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="~$\0"), min_size=1),  # which mean something in paths
    revision=st.none() | st.text(),
    rate=st.floats(1e-12, 1e3),
    modules=st.lists(st.text()),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_survives_writing_and_reading(tmp_path, good, name, revision, rate, modules):
    values = yaml.safe_load(good)
    values["model"] |= {"name_or_path": name, "revision": revision}
    values["adapter"]["target_modules"] = modules
    values["training"]["learning_rate"] = rate
    config = RunConfig.model_validate(values)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_paths_are_expanded_as_they_are_read_and_stay_so(load, good, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("ROWS", "/rows")
    text = good.replace("name_or_path: base", "name_or_path: ~/base").replace("output_dir: out", "output_dir: $ROWS$$x")
    config = load(
        text, "data.train=[$ROWS/a.jsonl, {path: '${ROWS}/b.jsonl'}]", "data.eval=~/e.jsonl", "data.chat_template=~/t"
    )
    assert config.model.name_or_path == "/home/me/base"
    assert config.data.train[0] == "/rows/a.jsonl"
    assert config.data.train[1].path == "/rows/b.jsonl"
    assert (config.data.eval, config.data.chat_template) == ("/home/me/e.jsonl", "/home/me/t")
    assert config.training.output_dir == "/rows$x"
    monkeypatch.setenv("HOME", "/home/you")
    assert load(dump_config(config)) == config


def test_a_path_that_stands_for_nothing_is_told_with_its_line(told, good):
    assert told(good.replace("rows.jsonl", "[$NOPE/a, ~/b]")) == [
        "run.yaml:6: data.train[0]: the variable NOPE in '$NOPE/a' is not set; set it, or write $$ for a dollar sign"
    ]


def test_a_seed_that_nobody_can_sow(told, good):
    for seed in (-1, 2**32):
        assert told(good, f"training.seed={seed}") == [
            f"--set training.seed: is {seed}; write a whole number from 0 to 4294967295"
        ]
