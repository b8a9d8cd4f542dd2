"""What was measured on this machine once, kept for the processes to come.

A machine is known by its processor's name, the threads that torch computes with, and torch's version.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from lowrank.paths import cache_folder
from lowrank.storage.machine_load import load_since, usage_now
from lowrank.storage.whole_file import write_whole

_known: dict[tuple[Path, str], float] = {}


def figure(what: str, measure: Callable[[], float]) -> float:
    """What was measured under a name on this machine; where it never was, `measure` is asked, and its answer kept.

    What was measured while other programs used the same cores serves this process alone. A cache that cannot be
    written, or read, keeps nothing from one process to the next.

    Args:
        what: All that the answer depends on beside the machine.
        measure: Takes its time.
    """
    file = _file()
    if (file, what) not in _known:
        kept = _read(file)
        if what not in kept:
            began = usage_now()
            kept[what] = measure()
            if not load_since(began).crowded:
                _write(file, {what: kept[what]})
        _known.update({(file, name): value for name, value in kept.items()})
    return _known[file, what]


def figures_known() -> dict[str, float]:
    """What this process knows by now, by name."""
    file = _file()
    return {name: value for (of, name), value in _known.items() if of == file}


def take_up_figures(known: Mapping[str, float]) -> None:
    """Goes on with what another process knew, whatever would be measured now: a choice that rests on it stays the same.

    Args:
        known: By name; of whichever machine.
    """
    file = _file()
    _known.update({(file, name): value for name, value in known.items()})


def _write(file: Path, found: dict[str, float]) -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(_read(file) | found, indent=1))


def _file() -> Path:
    name = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return cache_folder() / "machines" / f"{name.replace('/', ' ')}.json"


@cache
def processor() -> str:
    """The processor's name, family and model, as the kernel tells them: a name alone may stand for several."""
    told: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    found = [told[name] for name in ("model name", "cpu family", "model") if name in told]
    return " ".join(found) or platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, float]:
    with suppress(OSError, ValueError, TypeError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {name: float(value) for name, value in found.items()}
    return {}
