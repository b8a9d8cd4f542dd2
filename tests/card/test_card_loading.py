"""A dense base goes to a card tensor by tensor, from the pages of its file: the host holds no whole copy."""

from __future__ import annotations

import pytest
import torch
from pretended import Card, OnCard, on_host
from tiny import tiny_gemma2, tiny_llama

from lowrank.models import load_model


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("made", [tiny_llama, tiny_gemma2])
def test_dense_weights(made, dtype, tmp_path, monkeypatch):
    made().save_pretrained(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the pretended card is its own thread's
    expected = load_model(str(tmp_path), dtype=dtype, device="cpu").state_dict()
    came = []

    def note(func, args, kwargs, out):
        """Which dtype came over; a weight that was made on the host in the model's would be a copy of it there."""
        if func is torch.ops.aten._to_copy.default and not isinstance(args[0], OnCard) and args[0].numel() > 1:
            came.append(args[0])

    with Card() as card:
        card.hook = note
        model = load_model(str(tmp_path), dtype=dtype, device="cuda:0")
        found = {name: on_host(tensor) for name, tensor in model.state_dict().items()}
        assert all(isinstance(tensor, OnCard) for tensor in [*model.parameters(), *model.buffers()])
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    weights = [tensor for tensor in came if tensor.dim() > 1]
    assert len(weights) >= len({tensor.data_ptr() for tensor in found.values() if tensor.dim() > 1})
    assert {tensor.dtype for tensor in weights} == {torch.float32}  # as the file has them
