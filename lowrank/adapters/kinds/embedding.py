"""Embeddings: W (dim, vocabulary) is the table transposed, and a token is a one-hot input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.kinds.forwards import acts_as, tokens_in
from lowrank.adapters.kinds.kind import HostModule, Product, holds_weight
from lowrank.ops.low_rank import LowRank


class EmbeddingKind:
    """`torch.nn.Embedding`, and transformers' scaled ones (Gemma), whose output carries the factor `embed_scale`."""

    linear = False
    looked_up = True

    def fits(self, module: HostModule) -> bool:
        """An embedding that is looked up with token ids and perhaps scaled, nothing cleverer."""
        if not isinstance(module, nn.Embedding) or module.max_norm is not None or not holds_weight(module):
            return False
        return acts_as(module, nn.Embedding.forward, tokens_in, scaled_rows)

    def shape(self, module: HostModule) -> tuple[int, int]:
        """(dim, vocabulary)."""
        return module.embedding_dim, module.num_embeddings

    def weight(self, module: HostModule) -> torch.Tensor:
        """W, the table transposed."""
        return module.weight.t()

    def write(self, module: HostModule, weight: torch.Tensor) -> None:
        """Stored as a table again."""
        merged = weight.t().to(module.weight.dtype).contiguous()
        module.weight = nn.Parameter(merged, requires_grad=module.weight.requires_grad)

    def product(self, module: HostModule) -> Product | None:
        """None."""
        return None

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """Two look-ups and a small product."""
        y = type(module).forward(module, x)
        return y + self.delta(module, x, y, term)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """s · A[:, x]ᵀ · Bᵀ; dropout has no input to drop here, and is not applied (as in peft)."""
        low = F.embedding(x, term.A.t(), module.padding_idx, None, 2.0, module.scale_grad_by_freq, False)
        added = F.linear(low, term.B).to(y.dtype) * term.scale
        embed_scale = getattr(module, "embed_scale", None)
        if embed_scale is not None:
            added = added * (embed_scale.to(y.dtype) if isinstance(embed_scale, torch.Tensor) else embed_scale)
        if term.gain is None:
            return added
        gain = term.gain.to(y.dtype)
        return (gain - 1) * y + gain * added

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """As they are: features come last."""
        return values

    def in_file(self, module: HostModule, factor: Factor, values: torch.Tensor) -> tuple[str, torch.Tensor]:
        """`lora_embedding_A` (r, vocabulary) and `lora_embedding_B` (dim, r), no `.weight`."""
        return factor.on_table or factor.in_file, values


def scaled_rows(module: HostModule, ids: torch.Tensor) -> torch.Tensor:
    """The rows of some tokens, scaled where the module says so (Gemma)."""
    rows = module.weight[ids]
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)
