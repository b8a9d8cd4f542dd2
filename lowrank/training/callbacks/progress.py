"""What a person sees while a run works: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Callback, Run, StepMetrics

Task = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a piece of work by name and total; what it yields is told each time how much more of it is done."""


class Screen(Callback):
    """Step, loss, learning rate, supervised tokens a second and time left; and `task` for other pieces of work."""

    def __init__(self, console: Console, logging_steps: int = 1, name: str = "", bars: Progress | None = None) -> None:
        """What it shows where.

        Args:
            console: Where.
            logging_steps: A plain line comes every so many steps, its loss and speed averaged over them.
            name: Of the run, where it is one of several.
            bars: Those of all of them, which whoever made them starts and stops; None for its own.
        """
        self.console, self.logging_steps = console, logging_steps
        self._name, self._shared = name and f"{name}: ", bars is not None
        self._bars = bars_on(console) if bars is None else bars
        self._training: TaskID | None = None
        self._window: list[StepMetrics] = []
        self._steps, self._seconds = 0, 0.0

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A line when it begins and a bar while it goes on; what it gives is told how much more is done."""
        self._line(f"{name} ({total:,}) ...")
        bar = self._bars.add_task(f"{self._name}{name}", total=total, figures="")
        try:
            yield lambda done: self._bars.advance(bar, done)
        finally:
            self._bars.remove_task(bar)

    def on_run_start(self, run: Run) -> None:
        """Shows the bars."""
        self._training = self._bars.add_task(
            f"{self._name}training", total=run.total_steps, completed=run.step, figures=""
        )
        self._bars.start()

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """Moves the bar, or prints a line when one is due."""
        self._steps, self._seconds = self._steps + 1, self._seconds + metrics.seconds
        left = spoken(self._seconds / self._steps * (run.total_steps - run.step))
        if self._training is not None:
            self._bars.update(self._training, completed=run.step, figures=f"{_figures([metrics])}  {left} left")
        self._window.append(metrics)
        if run.step % self.logging_steps == 0 or run.step == run.total_steps or run.stop:
            self._line(f"step {run.step}/{run.total_steps}  {_figures(self._window)}  {left} left")
            self._window.clear()

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        why = f"loss {loss}, gradient norm {grad_norm}"
        self.console.print(f"{self._name}step {run.step}: skipped ({why}); {run.skipped} so far", highlight=False)

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        self.console.print(f"{self._name}step {run.step}: {evaluation}", highlight=False)

    def on_save(self, run: Run, path: Path) -> None:
        self.console.print(f"{self._name}step {run.step}: saved in {path}", highlight=False)

    def on_run_end(self, run: Run) -> None:
        """Lets the bars stand as they are."""
        self._stop()

    def _stop(self) -> None:
        if not self._shared:
            self._bars.stop()

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{self._name}{text}", highlight=False, soft_wrap=True)


def bars_on(console: Console) -> Progress:
    """Bars that a terminal shows, and nothing else does."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _figures(window: list[StepMetrics]) -> str:
    supervised = sum(metrics.supervised for metrics in window)
    loss = sum(metrics.loss * metrics.supervised for metrics in window) / supervised
    speed = supervised / sum(metrics.seconds for metrics in window)
    return f"loss {loss:.4f}  lr {window[-1].learning_rate:.2e}  {speed:,.0f} supervised tokens/s"


def spoken(seconds: float) -> str:
    """A duration as people say it: 40 s, 12 min, 3 h 05 min."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
