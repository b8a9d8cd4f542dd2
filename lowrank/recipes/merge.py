"""An adapter into its base, on disk: a model folder that needs nothing but transformers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.quantisers.registry import schemes
from lowrank.recipes.parts.task_opened import task_in
from lowrank.storage.folders import refuse_occupied
from lowrank.weights import MergeReport, merge_checkpoint
from lowrank.weights.files.dequantise import Onto
from lowrank.weights.merging.merge_checkpoint import Verify
from lowrank.weights.merging.merge_choices import Rounding


def merge_adapter(
    adapter: str | Path,
    out: str | Path | None = None,
    base: str | Path | None = None,
    *,
    dtype: str | None = None,
    rounding: Rounding = "nearest",
    onto: Onto = "dequantised",
    quantization: str | Mapping[str, Any] | None = None,
    verify: Verify = True,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merges with a progress bar in bytes (on a terminal), and says what it did.

    Args:
        adapter: An adapter folder.
        out: The new model folder; by default beside the adapter's, with its name and -merged.
        base: A model folder or a hub's name; the one in the adapter's config by default.
        dtype: "float32", "bfloat16", "float16" ...; the base's by default.
        rounding: "nearest" or "stochastic".
        onto: For an adapter trained over a quantised base: "dequantised", as it was trained, or "original".
        quantization: How the base was quantised in training, where the adapter's files do not say: a quantiser's
            options, or the name of one of its schemes (nf4, int8 ...; none for not at all).
        verify: True tries each changed tensor on a random vector; "answers" compares answers with base and adapter
            besides (each is loaded); False does neither.
        trust_remote_code: Whether the base may run its own code.

    Raises:
        InputError: Something that was given cannot be used; nothing is written.
        JobError: The disk is full, or the result failed its check; nothing is left behind.
    """
    if isinstance(quantization, str):
        known = schemes()
        if quantization not in known:
            raise InputError(f"there is no quantisation {quantization!r}; there are {', '.join(known)}")
        quantization = known[quantization]
    source = expanded(adapter)
    target = Path(expanded(out)) if out is not None else _beside(source)
    if out is None:
        refuse_occupied(target, fix=f"Name another folder: lowrank merge {shlex.quote(source)} OUT.")
    console = Console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("merging", total=None)
        report = merge_checkpoint(
            base and expanded(base),
            source,
            target,
            dtype=dtype,
            rounding=rounding,
            onto=onto,
            quantization=quantization,
            verify=verify,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print("\n".join([*_report_lines(report), _how_to_ask(str(report.out), task_in(source))]))
    return report


def _how_to_ask(out: str, task: str | None) -> str:
    """The command that asks the merged model, by what the adapter has learned."""
    if task is None:
        return f"ask it: lowrank chat {shlex.quote(out)}"
    named = "" if task_in(out) == task else f" --task {task}"
    return f'ask it: lowrank predict {shlex.quote(out)}{named} --text "..."'


def _beside(adapter: str | Path) -> Path:
    """Where an adapter's merged model goes unless another place is given: `runs/a` to `runs/a-merged`."""
    path = Path(adapter)
    path = path if path.name not in ("", "..") else path.resolve()
    return path.with_name(f"{path.name}-merged")


def _report_lines(report: MergeReport) -> list[str]:
    """The report as a person reads it."""
    speed = report.size / 2**20 / max(report.seconds, 1e-9)
    lines = [
        f"merged into {report.out}: {report.changed} of {report.tensors} tensors changed, "
        f"{report.size / 2**20:.0f} MiB in {report.seconds:.1f} s ({speed:.0f} MiB/s)"
    ]
    if report.worst is not None:
        name, share = report.worst
        lines.append(f"rounding lost {report.rounding_loss:.2%} of the adapter's effect (most in {name}: {share:.2%})")
    if report.proof is not None:
        lines.append(f"verified: {report.proof.tensors} tensors, each on a random vector")
    if report.verified is not None:
        found = report.verified
        lines.append(
            f"verified: answers to {found.prompts} prompts ({found.tokens} tokens): {found.same_greedy:.1%} of the "
            f"greedy choices are the same, logits off by {found.logit_error:.2%} of the adapter's effect"
        )
    if report.proof is None and report.verified is None:
        lines.append("not verified")
    return lines + report.notes
