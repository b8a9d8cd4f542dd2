"""What a model asks of its attention, and where it will run: what a backend says yes or no to."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """A model as its attention sees it.

    Attributes:
        architecture: Class of the model.
        device: Where its parameters are.
        dtype: Of its parameters' majority on the attention path (the config's, as loaded).
        current: transformers' name of the attention that it has now.
        head_dim: Size of a query head, the widest where layers differ; None: it has no attention.
        softcap: Soft-capping of the scores is on.
        sinks: Each head has a learned sink.
        window: Smallest sliding window of its layers; None: none slides.
        dropout: Largest attention dropout in training.
        own_masks: Some of its masks are more than causal ones with windows: image tokens see one another both ways.
        packing: Packs of several examples will be trained on.
        supports_paging: transformers can keep its keys and values in pages.
        supports_flash: transformers says that FlashAttention works for it.
        supports_flex: transformers says that FlexAttention works for it.
        supports_sdpa: transformers says that scaled_dot_product_attention works for it.
        swappable: It has attention, and transformers can change it.
    """

    architecture: str
    device: torch.device
    dtype: torch.dtype
    current: str
    head_dim: int | None
    softcap: bool
    sinks: bool
    window: int | None
    dropout: float
    own_masks: bool
    packing: bool
    supports_paging: bool
    supports_flash: bool
    supports_flex: bool
    supports_sdpa: bool
    swappable: bool


def setting_of(model: PreTrainedModel, packing: bool) -> Setting:
    """Read a model's setting off its config, its class and its parameters."""
    config = model.config.get_text_config()
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    parameter = next(model.parameters())
    return Setting(
        architecture=type(model).__name__,
        device=parameter.device,
        dtype=model.dtype,
        current=model.config._attn_implementation or "eager",
        head_dim=_head_dim(config),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks="sinks" in names,
        window=_window(config),
        dropout=max((float(getattr(config, name, 0.0) or 0.0) for name in _DROPOUTS), default=0.0),
        own_masks=_own_masks(model),
        packing=packing,
        supports_paging=_supports_paging(submodels, config),
        supports_flash=all(module._supports_flash_attn for module in submodels),
        supports_flex=all(module._supports_flex_attn for module in submodels),
        supports_sdpa=all(module._supports_sdpa for module in submodels),
        swappable=_head_dim(config) is not None and all(m._can_set_attn_implementation() for m in submodels),
    )


def _head_dim(config: PreTrainedConfig) -> int | None:
    sizes = [
        getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in getattr(config, "per_layer_config", (config,))
        if getattr(layer, "num_attention_heads", None)
    ]
    return max(sizes, default=None)


def _supports_paging(submodels: list[PreTrainedModel], config: PreTrainedConfig) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    return all(m._supports_attention_backend for m in submodels) and kinds <= {"full_attention", "sliding_attention"}


def _own_masks(model: PreTrainedModel) -> bool:
    """Asked of the text's config, and of the source of a model of several parts: no attribute tells it."""
    text = model.config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None):
        return True
    file = inspect.getsourcefile(type(model))
    return text is not model.config and file is not None and "block_sequence_ids" in Path(file).read_text("utf-8")


_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


def _window(config: PreTrainedConfig) -> int | None:
    window = getattr(config, "sliding_window", None)
    slides = "layer_types" not in config.__dict__ or any("sliding" in kind for kind in config.layer_types or ())
    return window if slides and getattr(config, "use_sliding_window", True) else None
