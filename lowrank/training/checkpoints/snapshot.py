"""All that a run needs to go on as if it had never stopped: what trains, the optimiser, the schedule, the position in
the data, every random state, and what the callbacks keep."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank.adapters.install import AdapterSet
from lowrank.errors import InputError
from lowrank.storage.machine_figures import figures_known, take_up_figures
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.machine.ranks import ALONE, Ranks
from lowrank.training.run import Callback, Run
from lowrank.training.steps import Position

_ANY = f".{AdapterSet.CHILD}."
"""In the name of a tensor that an adapter holds."""


def capture(run: Run, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The state of a run between two steps; each of its processes has random states of its own."""
    return {
        "step": run.step,
        "total_steps": run.total_steps,
        "data": run.data,
        "batches": run.batches,
        "position": asdict(run.position),
        "skipped": run.skipped,
        "before": None if run.before is None else run.before.as_dict(),
        "model": _moving(run.model, run.adapter),
        "optimizer": optimizer_state(run.model, run.optimizer, run.adapter),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": ranks.all(random_state()),
        "figures": figures_known(),
        "callbacks": {name: callback.state_dict() for name, callback in _by_name(run)},
    }


def restore(run: Run, state: dict[str, Any], ranks: Ranks = ALONE) -> None:
    """Takes up what `capture` gave: `run` is made from the same config, and has not taken a step.

    Raises:
        InputError: the state is of other examples, another model, adapter or optimiser.
    """
    if state["data"] != run.data:
        raise InputError(
            "the training rows are not those that the run was started with (or the tokenizer, its chat template, or "
            "whether shared beginnings are computed once)",
            fix="Put them back, or start anew in another folder.",
        )
    if state["batches"] != run.batches:
        raise InputError(
            f"a step of the run had {state['batches']} batches, and now it would have {run.batches}",
            where="training.gradient_accumulation_steps",
            fix="Set it so that processes times gradient_accumulation_steps is as before.",
        )
    load_model_state(run.model, state["model"], run.adapter)
    load_optimizer_state(run.model, run.optimizer, state["optimizer"], run.adapter)
    run.schedule.load_state_dict(state["schedule"])
    run.scaler.load_state_dict(state["scaler"])
    for name, callback in _by_name(run):
        if kept := state["callbacks"].get(name):
            callback.load_state_dict(kept)
    run.step, run.position, run.skipped = state["step"], Position(**state["position"]), state["skipped"]
    run.before = None if state["before"] is None else Evaluation.from_dict(state["before"])
    take_up_figures(state.get("figures", {}))  # which kernel is faster here decides how sums are rounded
    if ranks.index < len(state["random"]):
        set_random_state(state["random"][ranks.index])


def _by_name(run: Run) -> Iterator[tuple[str, Callback]]:
    """The callbacks by class name, numbered where there are several of a class."""
    seen: Counter[str] = Counter()
    for callback in run.callbacks:
        name = type(callback).__name__
        seen[name] += 1
        yield f"{name} {seen[name]}", callback


def _moving(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """What training changes: parameters that require gradients, and all that the run's adapter holds, its buffers among
    it. What other adapters hold is theirs."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    held = (*model.named_parameters(), *model.named_buffers())
    tensors |= {name: tensor.detach() for name, tensor in held if _ANY in f".{name}"}
    mine = _of(adapter)
    return {
        _alone(name, adapter): each for name, each in tensors.items() if _ANY not in f".{name}" or mine in f".{name}"
    }


def _of(adapter: str) -> str:
    return f"{_ANY}{adapter}."


def _alone(name: str, adapter: str) -> str:
    """The tensor's name in a run that has the model for itself: a checkpoint fits whatever trained beside it."""
    return name.replace(_of(adapter), _of(Run.adapter))


@torch.no_grad()
def load_model_state(model: nn.Module, saved: dict[str, torch.Tensor], adapter: str = Run.adapter) -> None:
    """Copies the saved tensors into the model's own, those of an adapter into its."""
    live = _moving(model, adapter)
    _same_names("model", live, saved)
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise _other(f"{name} is {list(saved[name].shape)} there and {list(tensor.shape)} here")
        tensor.copy_(saved[name])


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str = Run.adapter) -> dict[str, Any]:
    """The optimiser's state with parameters by name instead of by number."""
    names = _names(model, optimizer, adapter)
    state = optimizer.state_dict()
    return {
        "state": {names[number]: kept for number, kept in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], adapter: str = Run.adapter
) -> None:
    """Takes up what `optimizer_state` gave, whatever the order of the parameters was then."""
    numbers = {name: number for number, name in _names(model, optimizer, adapter).items()}
    known = {name: None for group in saved["param_groups"] for name in group["params"]}
    _same_names("optimiser", numbers, known)
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: kept for name, kept in saved["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]
            ],
        }
    )


def _names(model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str) -> dict[int, str]:
    """Parameters' names by the numbers that the optimiser's state gives them."""
    by_identity = {id(parameter): _alone(name, adapter) for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: by_identity[id(parameter)] for number, parameter in enumerate(parameters)}


def random_state() -> dict[str, Any]:
    """Of Python, numpy, and torch on the CPU and every CUDA device."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Takes up what `random_state` gave; CUDA's only where there are as many devices as then."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _same_names(what: str, here: dict[Any, Any], there: dict[Any, Any]) -> None:
    only = [f"{name} is only {place}" for name, place in _differing(here, there)]
    if only:
        raise _other(f"{what}: {'; '.join(only[:5])}{' ...' if only[5:] else ''}")


def _differing(here: dict[Any, Any], there: dict[Any, Any]) -> list[tuple[Any, str]]:
    return [(name, "here") for name in here if name not in there] + [
        (name, "in the checkpoint") for name in there if name not in here
    ]


def _other(what: str) -> InputError:
    return InputError(f"the checkpoint does not fit this run: {what}", fix="Resume with the run's own config.")
