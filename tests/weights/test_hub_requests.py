"""What a hub is asked while a base is loaded from it."""

from __future__ import annotations

import pytest
import torch
from hubstandin import COMMIT, serving
from tiny import tiny_llama

from lowrank.models import load_model

NAME = "me/tiny"


def test_a_base_is_asked_for_once(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Which commit it is, then each file; a second time which commit it is, alone."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    with serving(monkeypatch, tmp_path) as hub:
        hub.repos[NAME] = files
        found = load_model(NAME, device="cpu")
        of_commit = [path for path in hub.read if path.startswith("/api/models/")]
        fetched = [path.rpartition("/")[2] for path in hub.read if "/resolve/" in path and COMMIT in path]
        again = len(hub.read)
        load_model(NAME, device="cpu")
    assert of_commit == [f"/api/models/{NAME}"]
    assert fetched.count("config.json") == 2  # its size, and what it holds
    assert hub.read[again:] == [f"/api/models/{NAME}"]
    assert found.config._commit_hash == COMMIT
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
