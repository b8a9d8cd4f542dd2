"""The pages in a real browser: no error on its console, nothing cut off, readable in a narrow window and in the dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import AFTER, BEFORE, Run, Sample, page_of, run, step_line

from lowrank.training.callbacks.pages import page
from lowrank.training.evaluation.evaluation import Evaluation

__all__ = ["run"]  # the fixture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]

# What a person would see, said by the page itself.
LOOK = """
<script>addEventListener("load", () => {
  const asked = [...document.querySelectorAll(".asked")];
  const cut = asked.filter(e => e.scrollHeight > e.clientHeight + 1 || e.offsetHeight === 0).length;
  const said = {
    asked: asked.length, cut,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    charts: [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height > 40).length,
    broken: [...document.images].filter(e => !e.naturalWidth).length,
    paper: getComputedStyle(document.body).backgroundColor,
  };
  document.body.dataset.said = JSON.stringify(said);
});</script>
"""


def seen(path: Path, *options: str) -> dict:
    """What the page says of itself; fails on anything on the browser's console."""
    copy = path.with_name("looked-at.html")
    copy.write_text(path.read_text().replace("</body>", f"{LOOK}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert ":CONSOLE" not in done.stderr
    return json.loads(re.search(r'data-said="(.*?)"', done.stdout)[1].replace("&quot;", '"'))


@pytest.fixture
def report(run: Run) -> Path:
    run.before, run.step = BEFORE, 3
    turns = (("system", "Tools: " + "a long list of them, " * 200), ("user", "What is the time? " * 40))
    after = Evaluation(0.5, 10, 1.0, (Sample("ask", "yes", "yes " * 300, True, turns), *AFTER.samples))
    page_of(run, "".join(map(step_line, range(1, 40))), after)
    return run.output_dir / "report.html"


def test_the_question_is_in_view_and_nothing_is_broken(report):
    said = seen(report, "--window-size=1200,900")
    assert (said["asked"], said["cut"], said["broken"]) == (2, 0, 0)
    assert said["charts"] == 4
    assert said["wide"] <= 0


def test_a_narrow_window_needs_no_sideways_scrolling(report):
    said = seen(report, "--window-size=500,900")  # the narrowest that a headless window gets
    assert said["wide"] <= 0
    assert said["cut"] == 0


def test_it_follows_the_colour_scheme(report):
    light, dark = (seen(report, f"--blink-settings=preferredColorScheme={scheme}")["paper"] for scheme in (1, 0))
    assert (light, dark) == ("rgb(251, 251, 250)", "rgb(19, 21, 23)")


def test_the_page_of_several_runs(tmp_path):
    class Named:
        name = "a-run-with-a-rather-long-name"

    values = ["1e-4"] * 6
    path = tmp_path / "runs.html"
    path.write_text(page("runs", title="six", runs=[Named()] * 6, charts=[], results=[("a", "1", "2", "3", "4")] * 6,
                         differences=[("training.learning_rate", values)]))  # fmt: skip
    assert seen(path, "--window-size=500,900")["wide"] <= 0
