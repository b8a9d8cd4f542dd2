"""Make the rows of examples/classification and examples/embedding: names of emoji, with their language, or in two.

    pip install --no-deps emoji==2.16.0
    python examples/make_emoji.py    # emoji_languages_*.jsonl and emoji_names_*.jsonl in examples/data

The names are those of the package emoji (BSD), which has them from Unicode's CLDR (Unicode License). The same version
gives the same files, byte for byte, and no emoji of the eval split is in the train split.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
LANGUAGES = ("de", "es", "fr", "id", "it", "pt", "tr")
HELD_OUT, EACH = 250, 2


def names() -> list[dict[str, str]]:
    """For each emoji its name by language; without variants of skin, whose names are alike, and without flags."""
    emoji: Any = import_module("emoji")
    emoji.config.load_language()
    found = []
    for entry in emoji.EMOJI_DATA.values():
        if entry["status"] == emoji.STATUS["fully_qualified"] and not any(
            word in entry["en"] for word in ("skin_tone", "flag", "button", "clock", "hair")
        ):
            found.append({code: entry[code].strip(":").replace("_", " ") for code in ("en", *LANGUAGES)})
    return found


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the emoji rows.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: examples/data)")
    options = parser.parse_args()
    rng = random.Random(1)
    every = names()
    rng.shuffle(every)
    for split, entries in (("eval", every[:HELD_OUT]), ("train", every[HELD_OUT:])):
        rows = [
            {"text": entry[code], "label": code}
            for entry in entries
            for code in rng.sample(LANGUAGES, EACH)
            if sum(entry[code] == entry[other] for other in LANGUAGES) == 1  # a word of one language alone
        ]
        write(options.out / f"emoji_languages_{split}.jsonl", rows)
        pairs = [{"anchor": entry["en"], "positive": entry["de"]} for entry in entries if entry["en"] != entry["de"]]
        write(options.out / f"emoji_names_{split}.jsonl", pairs)


if __name__ == "__main__":
    main()
