"""What a person sees while a run goes on: a bar with rate and remaining time, and a line per evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Prints to the terminal on the main process; on the others, and with `enabled=False`, nothing but `say` ... does.

    Args:
        main: whether this process is the one that speaks.
        bar: show a progress bar; it needs a terminal, in files only the lines appear.
        unit: of the throughput, e.g. "images".
    """

    def __init__(self, *, main: bool, bar: bool, unit: str) -> None:
        self.main, self.unit = main, unit
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = bar and main and self.console.is_terminal
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line."""
        if self.main:
            self.console.print(text, markup=False)

    @contextlib.contextmanager
    def running(self, done: int, total: int) -> Iterator[None]:
        """Show the bar within the block."""
        if not self.bar:
            yield
            return
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} " + self.unit + "/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            self._progress = progress
            self._task = progress.add_task("", total=total, completed=done, epoch=0, loss=float("nan"), rate=0.0)
            try:
                yield
            finally:
                self._progress = None

    def step(self, done: int, *, epoch: int, loss: float, rate: float) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, epoch=epoch, loss=loss, rate=rate)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """The line of an evaluation."""
        scalars = "  ".join(f"{k} {v:.4f}" for k, v in line["val"].items() if isinstance(v, float))
        self.say(
            f"step {line['step']:>6}  epoch {line['epoch']:>6.1f}  training loss {line['train_loss']:.4f}  |  "
            f"validation {scalars}  |  {line['throughput']:,.0f} {self.unit}/s"
        )
