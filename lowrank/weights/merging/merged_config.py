"""What a merged model's config.json says otherwise than its base's."""

from __future__ import annotations

from typing import Any

from lowrank.weights.files.fingerprint import text_config
from lowrank.weights.files.model_folder import ModelFolder


def changed_config(base: ModelFolder, head: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json that change, without what the merge itself changes (dtype, quantisation, ties).

    Args:
        base: The base, in the sizes that the adapter was trained in.
        head: What the adapter's file says of its head: names of labels, for example.
    """
    config, changes = base.config, {}
    name = type(base.skeleton).__name__
    new_head = base.skeleton.base_model is not base.skeleton or not config.architectures
    if new_head and config.architectures != [name] and type(base.skeleton.config) is type(config):
        changes["architectures"] = [name]
    if base.sizes.vocabulary is not None:
        changes["vocab_size"] = base.sizes.vocabulary
    labels = base.sizes.labels
    if len(head.get("id2label", ())) == (base.skeleton.config.num_labels if labels is None else labels):
        changes |= {key: head[key] for key in ("id2label", "label2id", "problem_type") if key in head}
    elif labels is not None:
        changes["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        changes["label2id"] = {label: int(number) for number, label in changes["id2label"].items()}
    if getattr(text_config(config), "pad_token_id", None) is None and "pad_token_id" in head:
        changes["pad_token_id"] = head["pad_token_id"]
    return changes


def text_key(base: ModelFolder) -> str | None:
    """The key of config.json that holds the text model's config, where that is a part of it."""
    text = text_config(base.config)
    return next((name for name in base.config.sub_configs if getattr(base.config, name, None) is text), None)
