"""What an adapter can be exported for; the command line reads the names here, so nothing loads torch."""

from __future__ import annotations

from typing import Literal

Target = Literal["vllm", "llama.cpp", "mlx", "peft", "safetensors"]
