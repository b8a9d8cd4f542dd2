"""Rows from anywhere become examples whose every supervised token is known, and examples become batches."""

from lowrank.data.batches.batch import Batch, packed_batch, padded_batch
from lowrank.data.batches.batch_plan import BatchPlan, plan_batches
from lowrank.data.batches.batch_stream import BatchStream, stream_batches
from lowrank.data.batches.grouping import Members
from lowrank.data.batches.prefetch import Prefetched
from lowrank.data.examples.example import Example, Examples
from lowrank.data.examples.figures import DataReport
from lowrank.data.loading.load import load_examples, load_train_eval
from lowrank.data.preview.gathered import Preview, preview_of
from lowrank.data.preview.preview_html import preview_html
from lowrank.data.preview.preview_text import preview_text
from lowrank.data.reading.preferences import read_preferences
from lowrank.data.reading.sources import Source
from lowrank.data.supervision.check_supervision import check_fits, check_supervision
from lowrank.data.supervision.choose_template import TEMPLATES, complete_template, use_template
from lowrank.data.supervision.ends import end_tokens
from lowrank.data.supervision.generation import Question, answer_of, prompt_of, questions_of

__all__ = [
    "TEMPLATES",
    "Batch",
    "BatchPlan",
    "BatchStream",
    "DataReport",
    "Example",
    "Examples",
    "Members",
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
