"""The same LoRA fine-tune by lowrank and by what people use today, in alternating order, each in its own process.

    python benchmarks/finetune.py --case chat --method lora --dtype bfloat16 --repeats 5

Same weights, rows, rank, targets, dtype, learning rate and (on average) tokens in a step. `make bench` installs the
peers; torchtune and LitGPT stand in an environment of their own. Reported are real tokens a second (without padding)
and supervised ones, peak memory, the time to the first step and to the loss that peft + Trainer ends with, medians and
spread, the ratio to peft + Trainer, and the share of the machine's own matrix-product rate: the operations that a
LoRA step needs, divided by the time and by the rate of plain products of the model's shapes, measured in the same run
(of the base's products alone, and with the low-rank ones and attention's).
Writes a table, JSON and a plot to benchmarks/results/finetune-<device>-<case>-<method>-<dtype>.*
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from cases import CASES, model_of, rows_file_of
from finetune_report import Outcome, write
from yardstick import product_rate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "contestants"))
from job import Job, lengths_of  # noqa: E402

APART = HERE.parent / ".venv-bench" / "peers" / "bin" / "python"


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        file: In `contestants/`.
        python: What runs it.
        prepares: Whether it makes something of the base once, which counts for nothing.
        card: Whether it needs a CUDA device.
    """

    file: str
    python: Path = Path(sys.executable)
    prepares: bool = False
    card: bool = False


CONTESTANTS = {
    "lowrank": Contestant("lowrank_run.py"),
    "lowrank, rows apart": Contestant("lowrank_apart.py"),
    "lowrank, compiled": Contestant("lowrank_compiled.py"),
    "peft + Trainer": Contestant("peft_trainer.py"),
    "TRL SFT + packing": Contestant("trl_sft.py"),
    "torchtune": Contestant("torchtune_lora.py", python=APART),
    "LitGPT": Contestant("litgpt_lora.py", python=APART, prepares=True),
    "Unsloth": Contestant("unsloth_sft.py", card=True),
    "TRL SFT + Liger": Contestant("trl_liger.py", card=True),
}


def run(contestant: Contestant, job: Job, *options: str) -> tuple[dict | None, str]:
    """One process: what it measured and "", or None and why not."""
    if not contestant.python.exists():
        return None, "its environment is not there; `make bench` makes it"
    job = replace(job, launched=time.time())
    command = [str(contestant.python), str(HERE / "contestants" / contestant.file), *options, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, first_line(done.stderr) or f"ended with exit status {done.returncode}"
    return (None, "") if options else (json.loads(done.stdout.strip().splitlines()[-1]), "")


def first_line(stderr: str) -> str:
    """The first line of the error that ended a Python program; "" where it was no exception."""
    _, found, after = stderr.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in after.splitlines() if re.match(r"[A-Za-z_][\w.]*(:|$)", line)]
    return lines[0].strip() if found and lines else ""


def contest(names: list[str], job: Job, repeats: int) -> tuple[dict[str, Outcome], list[float]]:
    """All runs in alternating order, and the rate of plain products before each round."""
    outcomes, rates = {name: Outcome() for name in names}, []
    for name in names:
        if CONTESTANTS[name].prepares:
            outcomes[name].why_not = run(CONTESTANTS[name], job, "--prepare")[1]
    for repeat in range(repeats):
        rates.append(product_rate(job.model, getattr(torch, job.dtype), job.device))
        for name in names if repeat % 2 == 0 else names[::-1]:
            outcome = outcomes[name]
            if outcome.why_not:  # what failed once is not tried again
                continue
            result, outcome.why_not = run(CONTESTANTS[name], replace(job, seed=repeat))
            if result is None:
                print(f"{repeat + 1}: {name} does not run here: {outcome.why_not}", file=sys.stderr, flush=True)
            else:
                outcome.results[repeat] = result
                print(f"{repeat + 1}: {name}: {result['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    return outcomes, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="chat")
    parser.add_argument("--method", choices=["lora", "dora", "qlora"], default="lora")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="in a step; by default the case's")
    parser.add_argument("--steps", type=int, help="in a run, the first of them warm-up; by default the case's")
    parser.add_argument("--repeats", type=int, help="of a run; by default the case's")
    parser.add_argument("--only", action="append", choices=list(CONTESTANTS), help="leave the others out")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of what is written")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device on this machine")
    case = CASES[options.case]
    names = [name for name in options.only or CONTESTANTS if options.device == "cuda" or not CONTESTANTS[name].card]
    if not names or (options.steps or case.steps) < 2:
        parser.error("a contestant that runs on this device, and two steps at least, are needed")
    job = Job(
        str(model_of(options.case)),
        method=options.method,
        dtype=options.dtype,
        device=options.device,
        rows=options.rows or case.rows,
        steps=options.steps or case.steps,
        mean_length=case.mean_length,
        spread=case.spread,
        longest=case.longest,
        system=case.system,
        rows_file=rows_file_of(options.case),
        pack_tokens=case.pack_tokens,
    )
    repeats = options.repeats or case.repeats
    outcomes, rates = contest(names, job, repeats)
    lengths = [length for repeat in range(repeats) for length in lengths_of(replace(job, seed=repeat))]
    options.out.mkdir(exist_ok=True)
    stem = options.out / f"finetune-{options.device}-{options.case}-{options.method}-{options.dtype}"
    write(stem, options.case, job, outcomes, statistics.median(rates), lengths)


if __name__ == "__main__":
    main()
