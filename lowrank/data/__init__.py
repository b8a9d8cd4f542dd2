"""Rows from anywhere become examples whose every supervised token is known, and examples become batches."""

from lowrank.data.batch import Batch, packed_batch, padded_batch
from lowrank.data.check import check_fits, check_supervision
from lowrank.data.choose import TEMPLATES, complete_template, use_template
from lowrank.data.ends import end_tokens
from lowrank.data.example import Example, Examples
from lowrank.data.generation import Question, answer_of, prompt_of, questions_of
from lowrank.data.load import load_examples, load_train_eval
from lowrank.data.plan import BatchPlan, plan_batches
from lowrank.data.preferences import read_preferences
from lowrank.data.prefetch import Prefetched
from lowrank.data.preview import Preview, preview_of
from lowrank.data.preview_html import preview_html
from lowrank.data.preview_text import preview_text
from lowrank.data.report import DataReport
from lowrank.data.sources import Source
from lowrank.data.stream import BatchStream, stream_batches

__all__ = [
    "TEMPLATES",
    "Batch",
    "BatchPlan",
    "BatchStream",
    "DataReport",
    "Example",
    "Examples",
    "Prefetched",
    "Preview",
    "Question",
    "Source",
    "answer_of",
    "check_fits",
    "check_supervision",
    "complete_template",
    "end_tokens",
    "load_examples",
    "load_train_eval",
    "packed_batch",
    "padded_batch",
    "plan_batches",
    "preview_html",
    "preview_of",
    "preview_text",
    "prompt_of",
    "questions_of",
    "read_preferences",
    "stream_batches",
    "use_template",
]
