"""`lowrank init`: the configs that it writes for twelve situations stand in `init/`, so that a change of rules shows.

pytest tests/recipes/test_init.py --keep-configs      # writes them anew
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from tiny import tiny_llama, tiny_tokenizer

from lowrank.cli import main
from lowrank.config import load_config
from lowrank.errors import InputError
from lowrank.recipes.init import init
from lowrank.recipes.proposal.base import base_of
from lowrank.recipes.proposal.footprint import BESIDES, TRAINED, needed, weights
from lowrank.recipes.proposal.machine import GiB, Machine, machine_at_hand
from lowrank.recipes.proposal.rules import _ways

EXPECTED = Path(__file__).parent / "init"
LAPTOP = Machine(memory=12 * GiB, cores=4, bfloat16=0.5)
CARD = Machine(64 * GiB, 16, cards=1, card=24 * GiB, card_name="RTX 4090", bfloat16=2.0)
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
SIZES = {
    "small": transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "8b": transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **LLAMA),
    "70b": transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, **{**LLAMA, "num_attention_heads": 64}
    ),
    "hybrid": transformers.Lfm2Config(
        hidden_size=1024, intermediate_size=2560, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=65536, layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "experts": transformers.OlmoeConfig(
        hidden_size=1024, intermediate_size=512, num_hidden_layers=4, num_attention_heads=16, num_experts=16,
    ),
    "encoder": transformers.BertConfig(architectures=["BertForMaskedLM"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configs and tokenizers alone: no weight is there to be read."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in SIZES.items():
        config.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    SIZES["small"].save_pretrained(folder / "no-template")
    tiny_tokenizer(chat_template=None).save_pretrained(folder / "no-template")
    return folder


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(["red", "house", "seven", "walks", "under", "light"]) for _ in range(count))


def chat(count: int, system: str = "") -> list[dict]:
    draw = random.Random(0)
    lead = [{"role": "system", "content": system}] if system else []
    return [
        {
            "messages": [
                *lead,
                {"role": "user", "content": words(draw, draw.randint(3, 30))},
                {"role": "assistant", "content": words(draw, draw.randint(30, 90))},
            ]
        }
        for _ in range(count)
    ]


def tool_calls(count: int) -> list[dict]:
    rows = chat(count, system="Answer with a call as JSON. Tools: remind(time, what), play(song), list(items).")
    for number, row in enumerate(rows):
        row["messages"][-1]["content"] = json.dumps({"name": "remind", "arguments": {"time": number}})
    return rows


def alpaca(count: int) -> list[dict]:
    draw = random.Random(1)
    return [{"instruction": words(draw, 8), "input": words(draw, 4), "output": words(draw, 12)} for _ in range(count)]


def text(count: int) -> list[dict]:
    draw = random.Random(2)
    return [{"text": words(draw, draw.randint(50, 800))} for _ in range(count)]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(count: int) -> str:
    return "question,answer\n" + "".join(f"what is {n} + 1?,{n + 1}\n" for n in range(count))


SITUATIONS = {
    "chat_with_tools": ("small", "rows.jsonl", jsonl(tool_calls(800)), LAPTOP, "quality"),
    "alpaca": ("small", "rows.jsonl", jsonl(alpaca(3000)), LAPTOP, "quality"),
    "plain_text": ("small", "rows.jsonl", jsonl(text(400)), LAPTOP, "speed"),
    "question_answer_csv": ("small", "rows.csv", table(1000), LAPTOP, "quality"),
    "200_rows": ("small", "rows.jsonl", jsonl(chat(200)), LAPTOP, "memory"),
    "200000_rows": ("8b", "rows.jsonl", jsonl(chat(2000) * 100), CARD, "quality"),
    "8b_on_24_gib": ("8b", "rows.jsonl", jsonl(chat(1000)), Machine(24 * GiB, 8, bfloat16=2.0), "quality"),
    "8b_on_8_gib": ("8b", "rows.jsonl", jsonl(chat(1000)), Machine(8 * GiB, 8, bfloat16=2.0), "quality"),
    "no_template": ("no-template", "rows.jsonl", jsonl(chat(500)), LAPTOP, "quality"),
    "hybrid": ("hybrid", "rows.jsonl", jsonl(chat(500)), CARD, "quality"),
    "experts": ("experts", "rows.jsonl", jsonl(chat(500)), CARD, "quality"),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name, models, tmp_path, monkeypatch, request):
    model, file, rows, machine, goal = SITUATIONS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(models)
    Path(file).write_text(rows)
    path = init(file, f"./models/{model}", goal=goal, machine=machine, checked=False)
    written = path.read_text()
    load_config(path)
    assert all("  # " in line for line in written.splitlines() if line.startswith("  "))
    if request.config.getoption("--keep-configs"):
        (EXPECTED / f"{name}.yaml").write_text(written)
    assert written == (EXPECTED / f"{name}.yaml").read_text()


def test_a_base_that_fits_in_no_way_is_told_with_its_figures(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(jsonl(chat(100)))
    with pytest.raises(InputError, match=r"70b does not fit: in 4 bits its weights take 3\d\.\d GiB.*RTX 4090"):
        init("rows.jsonl", models / "70b", machine=CARD, checked=False)
    assert not Path("run.yaml").exists()


def test_an_encoder_is_told(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(jsonl(chat(10)))
    with pytest.raises(InputError, match="BertForMaskedLM, and a config trains causal language models only"):
        init("rows.jsonl", models / "encoder", checked=False)


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_what_was_decided_already_stands_as_asked(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(jsonl(chat(100)))
    asked = ["adapter.method=dora", "training.seed=7", "data.eval=0.5"]
    path = init("rows.jsonl", models / "small", machine=LAPTOP, overrides=asked, checked=False)
    config = load_config(path)
    assert (config.adapter.method, config.training.seed, config.data.eval) == ("dora", 7, 0.5)
    assert path.read_text().count("# as asked") == 3
    with pytest.raises(InputError, match="exists already"):
        init("rows.jsonl", models / "small", machine=LAPTOP, checked=False)
    with pytest.raises(InputError, match="learning_rat"):
        init("rows.jsonl", models / "small", "b.yaml", machine=LAPTOP, overrides=["training.learning_rat=1"])
    assert not Path("b.yaml").exists()


@pytest.mark.parametrize(
    ("asked", "epochs", "looks"),
    [
        ([], "3  # 800 rows are few, each is seen three times; about 298 steps", 60),
        (["training.max_steps=100"], None, 20),
        (["training.max_steps=12"], None, None),
        (["training.max_steps=100", "training.eval_steps=7"], None, 7),
        (["training.num_train_epochs=1"], "1  # as asked; about 100 steps", 20),
        (["training.tokens_per_batch=8192"], "3  # 800 rows are few, each is seen three times; about 73 steps", 10),
    ],
)
def test_comments_speak_of_the_steps_that_are_set(asked, epochs, looks, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(jsonl(tool_calls(800)))
    path = init("rows.jsonl", models / "small", machine=LAPTOP, overrides=asked, checked=False)
    lines = [" ".join(line.split()).replace(" # ", "  # ") for line in path.read_text().splitlines()]
    assert [line for line in lines if line.startswith("num_train_epochs")] == (
        [] if epochs is None else [f"num_train_epochs: {epochs}"]
    )
    assert load_config(path).training.eval_steps == looks
    assert path.read_text().count("load_best_model_at_end") == (looks is not None)


@pytest.mark.parametrize(
    ("method", "rate"), [("dora", 9.3e-4), ("adalora", 9.3e-4), ("full", 9.3e-5), ("bias", 9.3e-4)]
)
def test_another_method_takes_what_it_has_use_for(method, rate, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(jsonl(chat(100)))
    asked = [f"adapter.method={method}"]
    config = load_config(init("rows.jsonl", models / "small", machine=LAPTOP, overrides=asked, checked=False))
    assert config.adapter.method == method
    assert config.training.learning_rate == pytest.approx(rate)
    asked += ["training.learning_rate=0.1"]
    path = init("rows.jsonl", models / "small", "b.yaml", machine=LAPTOP, overrides=asked, checked=False)
    assert load_config(path).training.learning_rate == 0.1
    with pytest.raises(InputError, match="'bitfit' is no method"):
        init("rows.jsonl", models / "small", "c.yaml", machine=LAPTOP, overrides=["adapter.method=bitfit"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("paper.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "paper.pdf"),
        ("model.pkl", b"\x80\x04\x95\x10\x00", "model.pkl"),
    ],
)
def test_what_is_no_data_is_told(name, content, said, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    assert run(["init", name, "--model", str(models / "small"), "--no-check"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_what_is_missing_is_asked_for_only_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["init"]) == 2
    assert "DATA is missing" in capsys.readouterr().err


def test_what_init_writes_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    Path("rows.jsonl").write_text(jsonl(tool_calls(40)))
    assert run(["init", "rows.jsonl", "--model", "./base", "--set", "training.max_steps=2"]) == 0
    assert run(["train", "run.yaml"]) == 0
    assert Path("runs/rows/adapter_config.json").exists()


def test_sizes_are_those_of_the_model(models):
    base = base_of(str(models / "8b"))
    assert base.parameters == 8_030_261_248
    assert base.linear == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert base.per_rank == 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)


def test_activations_are_as_wide_as_products(models):
    """On a processor that is slow in bfloat16 a base in 16 bits, or 4, is computed in float32: so are its states."""
    base, tokens = base_of(str(models / "8b")), 512
    for machine, width in (
        (LAPTOP, 4),
        (CARD, 2),
        (replace(LAPTOP, bfloat16=2.0), 2),
        (replace(LAPTOP, bfloat16=0.9), 2),
    ):
        for way in _ways(machine, tokens, tokens, "memory"):
            assert way.recompute
            kept = (base.layers * base.hidden + base.kept) * tokens * width
            assert needed(base, way, 16) == pytest.approx(
                weights(base, way) + 16 * base.per_rank * TRAINED + kept + BESIDES
            )


def test_the_machine_at_hand():
    machine = machine_at_hand()
    assert machine.memory > 0
    assert machine.bfloat16 > 0
    assert machine.room < machine.memory
