"""The proof at the start of a run that the right tokens carry loss."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data.examples.example import Examples
from lowrank.data.examples.token_table import Cut
from lowrank.data.supervision.template import special_tokens
from lowrank.errors import InputError


def check_supervision(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prove, from the tokens alone, that every trained turn ends in a supervised end token and every example learns.

    A trained turn is a run of supervised tokens; its last one must be a special token. Examples cut at `max_length` may
    end in the middle of a turn. Under `train_on: all` runs are closed by white space that the template writes.

    Raises:
        InputError: names the first example that fails, and how many do.
    """
    table = examples.table
    learns = np.add.reduceat(table.supervised, table.starts[:-1], dtype=np.int64) > 0
    _refuse(examples, np.flatnonzero(~learns), "has no supervised token", "Look at it with `lowrank preview --row N`.")
    last, owner = _whole_turns(examples, tokenizer)
    ended = np.isin(table.ids[last], list(special_tokens(tokenizer).values()))
    failing = np.unique(owner[~ended])
    _refuse(
        examples,
        failing,
        "has a trained turn that does not end in a supervised end token, so the model would not learn to stop",
        "The chat template must write a special token (mostly eos_token) after an assistant's message.",
    )


def ends_of_turns(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The last token of every trained turn that is not cut, (n,) int32."""
    return examples.table.ids[_whole_turns(examples, tokenizer)[0]]


def _whole_turns(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Where every trained turn ends that is not cut at `max_length`, and the example that it is in."""
    table = examples.table
    last = _last_of_runs(table.supervised, table.starts)
    owner = np.searchsorted(table.starts, last, side="right") - 1
    cut = (table.cuts[owner] != Cut.WHOLE) & (last == table.starts[owner + 1] - 1)
    last, owner = last[~cut], owner[~cut]
    return (_before_white_space(table.ids, last, tokenizer) if examples.train_on == "all" else last), owner


def check_fits(examples: Examples, tokenizer: PreTrainedTokenizerBase, vocabulary: int, positions: int | None) -> None:
    """Prove that the model has a row of its embedding for every token, and a position for every place.

    Args:
        examples: The data set.
        tokenizer: What its tokens mean.
        vocabulary: Rows of the model's embedding.
        positions: The longest sequence that the model can take; None: any.

    Raises:
        InputError: names the first example that does not fit, and how many do not.
    """
    table = examples.table
    largest = np.maximum.reduceat(table.ids, table.starts[:-1]) if len(table.ids) else table.ids
    over = np.flatnonzero(largest >= vocabulary)
    if len(over):
        token = int(largest[over[0]])
        _refuse(
            examples,
            over,
            f"holds the token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the model's embedding has only "
            f"{vocabulary} rows",
            "Take the tokenizer that belongs to the model, or save the model with an embedding that is large enough: "
            "model.resize_token_embeddings(len(tokenizer)).",
        )
    lengths = np.diff(table.starts)
    if positions is not None:
        long = np.flatnonzero(lengths > positions)
        _refuse(
            examples,
            long,
            f"has {lengths[long[0]] if len(long) else 0} tokens, and the model has only {positions} positions",
            f"Set data.max_length: {positions}, and data.too_long to drop or truncate (plain text: also split).",
        )


def _last_of_runs(supervised: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Positions of the last token of every run of supervised tokens; runs do not cross examples."""
    follows = np.append(supervised[1:], False)
    follows[starts[1:] - 1] = False
    return np.flatnonzero(supervised & ~follows)


def _before_white_space(ids: np.ndarray, last: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    known: dict[int, bool] = {}

    def is_white(token: int) -> bool:
        if token not in known:
            known[token] = not str(tokenizer.decode([token])).strip()
        return known[token]

    return np.array([at - 1 if is_white(int(ids[at])) else at for at in last.tolist()], dtype=np.int64)


def _refuse(examples: Examples, failing: np.ndarray, what: str, fix: str) -> None:
    if len(failing):
        where = examples.rows.where(int(examples.table.example_rows[failing[0]]))
        others = f" (and {len(failing) - 1} more do)" if len(failing) > 1 else ""
        raise InputError(f"the row {what}{others}", where=where, fix=fix)
