"""What a method's tensor is called in files, and how modules of each kind shape it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Factor:
    """One tensor that a method trains for each module.

    Attributes:
        name: Its bare name ("lora_A"), by which a layer has it as an attribute.
        in_file: Its name in peft's files, after the module's path ("lora_A.weight").
        side: What of W it stands on, which is how a convolution shapes it: the inputs (r, in), the outputs (out, r), or
            each row of W by itself (out,); None where files keep it as it is.
        on_table: Its name on an embedding, where that is another.
    """

    name: str
    in_file: str
    side: Literal["in", "out", "row"] | None = None
    on_table: str | None = None
