"""Rows from anywhere become examples whose every supervised token is known, and examples become batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.lazily import on_first_use

if TYPE_CHECKING:
    from lowrank.data.batches.batch import Batch as Batch
    from lowrank.data.batches.batch import packed_batch as packed_batch
    from lowrank.data.batches.batch import padded_batch as padded_batch
    from lowrank.data.batches.batch_plan import BatchPlan as BatchPlan
    from lowrank.data.batches.batch_plan import plan_batches as plan_batches
    from lowrank.data.batches.batch_stream import BatchStream as BatchStream
    from lowrank.data.batches.batch_stream import stream_batches as stream_batches
    from lowrank.data.batches.grouping import Members as Members
    from lowrank.data.batches.prefetch import Prefetched as Prefetched
    from lowrank.data.examples.example import Example as Example
    from lowrank.data.examples.example import Examples as Examples
    from lowrank.data.examples.figures import DataReport as DataReport
    from lowrank.data.loading.load import load_examples as load_examples
    from lowrank.data.loading.load import load_train_eval as load_train_eval
    from lowrank.data.preview.gathered import Preview as Preview
    from lowrank.data.preview.gathered import preview_of as preview_of
    from lowrank.data.preview.preview_html import preview_html as preview_html
    from lowrank.data.preview.preview_text import preview_text as preview_text
    from lowrank.data.reading.sources import Source as Source
    from lowrank.data.supervision.check_supervision import check_fits as check_fits
    from lowrank.data.supervision.check_supervision import check_supervision as check_supervision
    from lowrank.data.supervision.choose_template import TEMPLATES as TEMPLATES
    from lowrank.data.supervision.choose_template import complete_template as complete_template
    from lowrank.data.supervision.choose_template import use_template as use_template
    from lowrank.data.supervision.ends import end_tokens as end_tokens
    from lowrank.data.supervision.generation import Question as Question
    from lowrank.data.supervision.generation import answer_of as answer_of
    from lowrank.data.supervision.generation import prompt_of as prompt_of
    from lowrank.data.supervision.generation import questions_of as questions_of

__getattr__, __dir__, __all__ = on_first_use(__name__, __file__)
