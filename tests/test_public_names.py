"""Every public name works on its first use in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import lowrank

# A child is forked for each name before lowrank was ever imported: as fresh as a process of its own, and as quick as
# one start of torch and transformers for all of them.
FIRST_USES = """
import json, os, sys
import torch, transformers, datasets, peft
names, failed = json.loads(sys.argv[1]), {}
for name in names:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            import lowrank
            first, second = getattr(lowrank, name), getattr(lowrank, name)
            assert first is second, f"{first!r}, then {second!r}"
            assert callable(first) == (name not in lowrank._ROOMS), f"{first!r}"
            told = ""
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        failed[name] = pipe.read()
    os.wait()
print(json.dumps({name: told for name, told in failed.items() if told}))
"""

FIRST_WRAP = """
import lowrank, torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
assert lowrank.describe(model) == {}
lowrank.wrap(model, lowrank.LoraConfig(target_modules=["0"]))
assert list(lowrank.describe(model)) == ["default"]
import types
assert type(lowrank.adapters) is types.ModuleType
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_name_is_there_on_its_first_use():
    names = [*lowrank.__all__, *lowrank._ROOMS]
    assert len(names) > 20
    assert json.loads(run(FIRST_USES, json.dumps(names)).splitlines()[-1]) == {}


def test_a_fresh_process_describes_and_wraps():
    run(FIRST_WRAP)


def test_what_is_listed_is_what_can_be_had():
    assert set(lowrank.__all__) | set(lowrank._ROOMS) == set(dir(lowrank)) - {"__version__"}
