"""`lowrank report`: two runs on one page, and what is no run is told."""

from __future__ import annotations

import re

import pytest

from lowrank.errors import InputError
from lowrank.recipes.report import report
from lowrank.recipes.train import train


def test_two_runs_stand_beside_one_another(write_config, tmp_path):
    for name, rate in (("a", 1e-2), ("b", 1e-4)):
        train(write_config(training={"output_dir": name, "max_steps": 2, "learning_rate": rate}))
    page = report(["a", "b"], "both.html").read_text()
    table = page.partition("What differs")[2]
    assert re.findall(r"<td>(.*?)</td>", table) == ["training.learning_rate", "0.01", "0.0001"]
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href|url)\\W{1,3}https?:", page)
    with pytest.raises(InputError, match="from 2 to 8"):
        report(["a"])
    with pytest.raises(InputError, match="is no run's folder"):
        report(["a", str(tmp_path)])
