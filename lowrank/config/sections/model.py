"""What is trained: the base."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from lowrank.config.sections.choices import Attention, QuantMethod, Task
from lowrank.config.sections.section import PathText, Section
from lowrank.ops.dtypes import Dtype
from lowrank.quantisers.registry import DEFAULT


class ModelSection(Section):
    """The base model."""

    name_or_path: PathText
    """A folder with a saved model (relative to the current folder), or a name on the hub."""

    revision: str | None = None
    """Branch, tag or commit of a hub repository."""

    adapter: PathText | None = None
    """Go on from this adapter (the folder of a run or an adapter, or a name on the hub): it is what trains, with its
    own method, rank and targets, and the section `adapter` is left out."""

    task: Task | None = None
    """What the base learns to do; found by the rows where it is plain: text and label make sequence_classification.
    All others are causal_lm; reward, of chosen and rejected, is learned only where it is named here."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """Of sequence_classification, by transformers' names; found by the labels: names and whole numbers are classes,
    lists of them several at once, numbers with a point a regression."""

    dtype: Literal["auto", Dtype] = "auto"
    """What the base's weights are held in; auto takes the checkpoint's."""

    compute_dtype: Literal["auto", Dtype] = "auto"
    """What products are computed in; auto takes what is fastest on this machine of what loses nothing against `dtype`:
    float32 beside 16-bit weights where that is faster, else the weights' own."""

    attention: Attention = "auto"
    """Attention backend: auto takes the fastest that is exact for this model and machine."""

    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default the accelerator if there is one."""

    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""


class QuantizationSection(Section):
    """The base is held in few bits, and the adapter is trained over it (QLoRA)."""

    quant_method: QuantMethod = DEFAULT
    """The library that quantises. What begins with load_in or bnb is about bitsandbytes."""

    bits: int | None = None
    """How many bits a weight has, for libraries other than bitsandbytes."""

    load_in_4bit: bool = False
    """Four bits a weight."""

    load_in_8bit: bool = False
    """Eight bits a weight."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values that a 4-bit weight can have."""

    bnb_4bit_use_double_quant: bool = False
    """Quantise the scales as well: 0.4 bits a weight less."""

    bnb_4bit_compute_dtype: Dtype | None = None
    """bitsandbytes' name for `model.compute_dtype`: set either."""

    bnb_4bit_quant_storage: Literal["uint8", Dtype] = "uint8"
    """What packed weights are stored as; sharding needs the model's own dtype."""

    @property
    def width(self) -> int:
        """How many bits a weight has."""
        return self.bits or (4 if self.load_in_4bit else 8)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.quant_method != DEFAULT and self.bits is None:
            raise ValueError(f"bits is not set, and {self.quant_method} is told by it how many to take")
        if self.quant_method == DEFAULT and self.load_in_4bit == self.load_in_8bit:
            given = str(self.load_in_4bit).lower()
            raise ValueError(
                f"load_in_4bit is {given}, and so is load_in_8bit; set one to true, or leave the section out"
            )
        return self
