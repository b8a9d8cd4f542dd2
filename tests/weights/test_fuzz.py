"""Damaged files: at least 2,000 of them, each refused with a message or read right; never a crash, never a wrong success."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import VOCAB, tiny_gpt2, tiny_llama
from weight_helpers import save_base

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError, JobError
from lowrank.storage.tensorfile import open_tensors
from lowrank.weights import merge_checkpoint
from lowrank.weights.files.adapter_file import open_adapter
from lowrank.weights.files.model_folder import open_base

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**200,
    1e308,
    float("inf"),
    "",
    "F32",
    "BF16",
    "Q9",
    [],
    [[]],
    {},
    "é\u0000",
]


def tiny_bart() -> transformers.PreTrainedModel:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=32, **layers, **heads)
    )


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"]
    shapes = [(4, 32), (32, 4)] * 2
    return {name: torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)}


def assemble(header: object, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def parts(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """What a disk or a broken download does."""
    data = bytearray(content)
    how = rng.randrange(6)
    if how == 0:
        return bytes(data[: rng.randrange(len(data))])
    if how == 1:
        return bytes(data) + rng.randbytes(rng.randrange(1, 50))
    if how == 2:
        start = rng.randrange(len(data))
        del data[start : start + rng.randrange(1, 200)]
        return bytes(data)
    if how == 3:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8]))
        return bytes(data)
    for _ in range(rng.randrange(1, 9)):
        end = len(data) if how == 4 else min(len(data), 600)
        data[rng.randrange(end)] = rng.randrange(256)
    return bytes(data)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """What a liar writes."""
    header, data = parts(content)
    header = copy.deepcopy(header)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    how = rng.randrange(12)
    if how == 0:
        entry["shape"][rng.randrange(2)] = rng.choice(ODD)
    elif how == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(ODD)
    elif how == 2:
        entry["dtype"] = rng.choice(ODD)
    elif how == 3:
        entry[rng.choice(["shape", "data_offsets", "dtype"])] = rng.choice(ODD)
    elif how == 4:
        del entry[rng.choice(["shape", "data_offsets", "dtype"])]
    elif how == 5:
        header[name] = rng.choice(ODD)
    elif how == 6:
        other = rng.choice([key for key in header if key not in ("__metadata__", name)])
        entry["data_offsets"] = header[other]["data_offsets"]
    elif how == 7:
        header["__metadata__"] = rng.choice([*ODD, {"format": 3}, {"lowrank.base": rng.choice(["{", "[]", "{}", "3"])}])
    elif how == 8:
        del header[name]
    elif how == 9:
        raw = json.dumps(header).encode()
        return assemble(raw[:-1] + b"," + json.dumps({name: entry}).encode()[1:], data)
    elif how == 10:
        return assemble(b"[" * rng.randrange(1, 100_000), data)
    else:
        entry["shape"] = [2**31, 2**31, 0] if rng.random() < 0.5 else [2**62, 2**62]
    return assemble(header, data)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_tensors(path: Path) -> bool:
    """Whether the file could be read; what is read must be what the format's own library reads."""
    message = ""
    try:
        file = open_tensors(path)
        ours = {name: file.read(name) for name in file.entries}
    except InputError as error:
        message = str(error)
    if message:
        assert str(path) in message or "dtype" in message
        return False
    theirs = load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)) if tensor.numel() else True
    return True


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = lowrank.wrap(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    return lowrank.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("damage", [damage_bytes, damage_header])
def test_damaged_tensor_files(adapter: Path, damage, tmp_path: Path) -> None:
    content = (adapter / "adapter_model.safetensors").read_bytes()
    path, rng = tmp_path / "damaged.safetensors", random.Random(1)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused = 0
    for _ in range(900):
        path.write_bytes(damage(content, rng))
        refused += not check_tensors(path)
    assert refused > 500  # flipped bits in the data alone cannot be seen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert time.monotonic() - started < 120


def damage_config(text: str, rng: random.Random) -> str:
    config = json.loads(text)
    key = rng.choice(list(config))
    how = rng.randrange(6)
    if how == 0:
        config[key] = rng.choice([value for value in ODD if value != float("inf")])
    elif how == 1:
        del config[key]
    elif how == 2:
        config[rng.choice(["layer_replication", "use_qalora", "arrow_config", "Ranks", ""])] = rng.choice([1, "x", [3]])
    elif how == 3:
        return text[: rng.randrange(len(text))]
    elif how == 4:
        spot = rng.randrange(len(text))
        return text[:spot] + chr(rng.randrange(1, 0x500)) + text[spot + 1 :]
    else:
        return rng.choice(["", "null", "[]", "[" * 50_000, "{" * 50_000, '"x"', "NaN", '{"a": 1, "a": 2}', "\ufeff{}"])
    return json.dumps(config)


def test_damaged_configs(adapter: Path) -> None:
    """What passes must mean what the untouched config means, or differ in a field that the file shows."""
    path, rng = adapter / "adapter_config.json", random.Random(2)
    text = path.read_text()
    whole = open_adapter(adapter).config
    refused = 0
    for _ in range(500):
        damaged = damage_config(text, rng)
        path.write_text(damaged)
        try:
            read = open_adapter(adapter)
        except InputError:
            refused += 1
            continue
        written = json.loads(damaged)
        for name, value in read.config.model_dump().items():
            if value != whole.model_dump()[name]:
                assert name not in written or written[name] != json.loads(text).get(name)
    assert 150 < refused < 500


def test_damaged_models_are_never_merged_wrong(adapter: Path, tmp_path: Path) -> None:
    """Through the whole merge: a message and nothing written, or the result of the file as it reads."""
    base = save_base(tiny_llama(), tmp_path / "base")
    rng = random.Random(3)
    files = [base / "model.safetensors", adapter / "adapter_model.safetensors", base / "config.json"]
    untouched = {file: file.read_bytes() for file in files}
    out = tmp_path / "merged"
    merged = 0
    for _ in range(120):
        file = rng.choice(files)
        damage = damage_bytes if file.suffix == ".json" else rng.choice([damage_bytes, damage_header])
        file.write_bytes(damage(untouched[file], rng))
        try:
            merge_checkpoint(base, adapter, out)
        except (InputError, JobError):
            assert not out.exists()
        else:
            merged += 1
            assert check_tensors(out / "model.safetensors")
            before, factors = load_file(files[0]), load_file(files[1])
            after = load_file(out / "model.safetensors")
            name = "model.layers.0.self_attn.q_proj"
            A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2.0 * B @ A)
            for child in sorted(out.rglob("*"), reverse=True):
                child.unlink()
            out.rmdir()
        file.write_bytes(untouched[file])
        assert not list(tmp_path.glob(".merged*"))
    assert merged < 90


def refusal(folder: Path) -> str:
    """Why a model folder is refused; nothing where it is not."""
    try:
        open_base(folder)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bart])
def test_odd_values_in_a_models_config(make, tmp_path: Path) -> None:
    """A wrong value may fail anywhere in transformers; some counts would take hours, or all memory."""
    base = save_base(make(), tmp_path / "base")
    path = base / "config.json"
    config = json.loads(path.read_text())
    cases = [(key, value) for key in [*config, "rope_parameters", "quantization_config"] for value in ODD]
    counts = ["num_labels", *(key for key in config if "layer" in key and isinstance(config[key], int))]
    cases = random.Random(4).sample(cases, 120) + [(key, count) for key in counts for count in (2**31, 2**200)]
    cases += [("architectures", value) for value in ODD]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused = 0
    for key, value in cases:
        path.write_text(json.dumps(config | {key: value}))
        if message := refusal(base):
            refused += 1
            assert str(base) in message
            assert len(message.splitlines()) < 4
    assert 50 < refused < len(cases)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert time.monotonic() - started < 60


def test_indexes(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base", max_shard_size="40KB")
    adapter = lowrank.save(lowrank.wrap(tiny_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "adapter")
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    other = next(file for file in good["weight_map"].values() if file != good["weight_map"][name])
    for change in (
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": good["weight_map"] | {name: "../../etc/passwd.safetensors"}},
        {"weight_map": good["weight_map"] | {name: "missing.safetensors"}},
        {"weight_map": good["weight_map"] | {name: 3}},
        {"weight_map": good["weight_map"] | {"no.such.tensor": other}},
        {"weight_map": good["weight_map"] | {name: other}},
        {},
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(InputError):
            merge_checkpoint(base, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
