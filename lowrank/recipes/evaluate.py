"""How good a base or an adapter is, on the evaluation data of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.config import RunConfig, load_config
from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.recipes.assess import assess
from lowrank.recipes.prepare import base_model, base_tokenizer, read_examples, swap_attention
from lowrank.recipes.show import open_console
from lowrank.training.evaluate import Evaluation
from lowrank.training.loss import supervised_loss
from lowrank.training.progress import Screen
from lowrank.weights import load


def evaluate(
    config: RunConfig | str | Path, adapter: str | Path | None = None, overrides: Sequence[str] = ()
) -> Evaluation:
    """Evaluates, and prints the figures.

    Args:
        config: A config, or the path of one.
        adapter: An adapter's folder; the base alone without it.
        overrides: `section.key=value`, for a path.

    Raises:
        InputError: the config names no evaluation data, or something cannot be used.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    adapter = adapter and expanded(adapter)
    if config.data.eval is None:
        raise InputError("there is nothing to evaluate on", where="data.eval", fix="Name the evaluation data.")
    console = open_console()
    tokenizer = base_tokenizer(config)
    _, examples = read_examples(config, tokenizer)
    assert examples is not None, "data.eval is set"
    model = base_model(config)
    if adapter is not None:
        load(model, adapter)
    swap_attention(model, config)
    loss = supervised_loss(model)
    with Screen(console) as screen:
        generate = config.training.predict_with_generate
        result = assess(model, tokenizer, examples, config, loss, screen.task, generate=generate)
    console.print(f"{adapter or config.model.name_or_path} on {len(examples)} examples of {config.data.eval}: {result}")
    return result
