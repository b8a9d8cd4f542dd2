"""On what it is trained."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lowrank.config.sections.choices import Format
from lowrank.config.sections.section import PathText, Section, Tokens
from lowrank.data.supervision.row_options import BadRows, TooLong, TrainOn


def _day(written: str) -> str:
    try:
        return date.fromisoformat(written).isoformat()
    except ValueError:
        raise ValueError(f"{written!r} is no date; write one as 2026-11-26") from None


class SourceSection(Section):
    """One of several sources."""

    path: PathText
    """A file, a folder, or a name on the hub."""

    format: Format | None = None
    """What its rows hold; found by looking at them where it is not named."""

    weight: float | None = Field(default=None, gt=0)
    """Its share of an epoch's examples, relative to the other sources' weights; by default it is taken as it is."""

    split: str = "train"
    """Which split of a data set that has several."""

    subset: str | None = None
    """Which configuration of a data set on the hub."""

    columns: dict[str, str] | None = None
    """Where the keys of a format are found in its rows; see data.columns."""


class DataSection(Section):
    """What is trained on."""

    train: PathText | list[PathText | SourceSection]
    """The training data: a file or a folder (relative to the current folder), or a name on the hub. A pattern such as
    data/*.jsonl stands for several files. They are .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md, and may be
    compressed (.gz, .zst, .bz2, .xz). A list mixes several sources, all with a weight or none."""

    eval: PathText | Annotated[float, Field(gt=0, lt=1)] | list[PathText | SourceSection] | None = None
    """The evaluation data, in the same forms; or a share of the training rows to set aside, such as 0.05."""

    chat_template: PathText | None = None
    """chatml, llama3, gemma, phi, mistral or plain; or a .jinja file. By default the tokenizer's own."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_day)] | None = None
    """The date, as 2026-11-26, for chat templates that write the day's (Llama 3.2's, gpt-oss'); by default the day on
    which the run began, which a resumed run keeps."""

    format: Format | None = None
    """What a row holds; found by looking at the rows where it is not named."""

    columns: dict[str, str] | None = None
    """Where the keys of a format are found in the rows, such as {prompt: question, completion: answer}. Known without
    it are question, query and input for prompt, answer, response and output for completion."""

    transform: str | None = None
    """module:function, from the current folder or what is installed: takes a row (a dict) before its format and columns
    are looked at, and gives a row, or None to leave it out. Where its module changes, rows are read anew."""

    bad_rows: BadRows = "error"
    """What is done with rows that cannot be used; skip counts them, lists the first ten, and refuses more than 5 %."""

    max_length: Tokens = 1024
    """The most tokens in an example."""

    too_long: TooLong = "error"
    """What is done with a longer one; split cuts plain text into several examples."""

    streaming: bool = False
    """Read, tokenise and pack rows while training goes on, for data that does not fit; needs training.max_steps."""

    packing: bool = True
    """Several examples in one row, without padding and without seeing one another."""

    share_prefixes: Literal["auto"] | bool = "auto"
    """What examples in a pack begin with in common (a system prompt, a document) is computed once: each learns what it
    would alone. Auto does so where it saves 5 % of the tokens and the model allows it, but not with dropout or NEFTune,
    which would draw once for all of them. A step holds as many tokens of examples as without."""

    train_on: TrainOn = "assistant"
    """Which tokens carry loss."""

    max_train_rows: int | None = Field(default=None, ge=1)
    """Read only so many rows of the training data."""

    max_eval_rows: int | None = Field(default=None, ge=1)
    """Read only so many rows of the evaluation data."""
