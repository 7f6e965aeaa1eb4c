"""What a person sees while an ablation runs: runs done, running and failed, and how long the rest takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .. import run_folder as report
from .locks import try_lock
from .plan import Job, Plan
from .report.text import scores, si
from .work import Board, lock_path


def duration(seconds: float) -> str:
    """Seconds as `2 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


class Watch:
    """Counts of an ablation's runs, from the disk, whichever processes do them.

    Args:
        plan: of the ablation.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.board = plan, Board(plan)
        self.began = time.monotonic()
        self.expected = self.board.expected()
        self.seconds: dict[str, float] = {}  # of finished runs
        self._look()
        self.before = set(self.board.done) | set(self.board.failed)

    def _look(self) -> list[Job]:
        needed = self.board.needed()
        for job in needed:
            if self.board.refresh(job) and job.identity in self.board.done and job.identity not in self.seconds:
                self.seconds[job.identity] = report.read_json(job.folder / "summary.json")["train_seconds"]
        return [job for job in needed if not self.board.refresh(job)]

    def look(self) -> tuple[int, int, list[Job], float | None]:
        """(done, failed, running, seconds left); the last is None before anything finished here."""
        left = self._look()
        running = []
        for job in left:
            if lock_path(job).exists():
                with try_lock(lock_path(job)) as free:
                    if not free:
                        running.append(job)
        done, failed = len(self.board.done), len(self.board.failed)
        over = set(self.board.done) | set(self.board.failed)
        fresh = [i for i in over - self.before if i in self.seconds]
        if not fresh:
            return done, failed, running, None
        # an arm's runs take about as long as each other: time left is in proportion to their seconds of training
        of_arm = {job.identity: job.cell.arm for job in self.plan.jobs()}
        arms: dict[str, list[float]] = {}
        for identity, seconds in self.seconds.items():
            arms.setdefault(of_arm[identity], []).append(seconds)
        mean = sum(self.seconds.values()) / len(self.seconds)
        weights = [sum(a) / len(a) if (a := arms.get(job.cell.arm)) else mean for job in left]
        unknown = max(0, self.expected - done - failed - len(left)) * mean
        speed = sum(self.seconds[i] for i in fresh) / (time.monotonic() - self.began)
        return done, failed, running, (sum(weights) + unknown) / max(speed, 1e-9)


class SweepDisplay:
    """Prints the state of an ablation: a live bar in a terminal, else a line for each run that ended.

    Args:
        plan: of the ablation.
        enabled: False prints nothing.
    """

    def __init__(self, plan: Plan, *, enabled: bool = True) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=not enabled)
        self.plan, self.watch = plan, Watch(plan)
        self.live = self.console.is_terminal and enabled
        self._shown, self._at = self.state(), 0.0

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, markup=False)

    def state(self) -> tuple[int, int, str]:
        """(done, failed, both and the rest as text)."""
        done, failed, running, left = self.watch.look()
        parts = [f"{done} of {self.watch.expected} runs done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{len(running)} running"] if running else []
        parts += [f"about {duration(left)} left"] if left is not None and done + failed < self.watch.expected else []
        names = "; ".join(job.label for job in running[:3])
        return done, failed, ", ".join(parts) + (f"   {names}" if names else "")

    def __rich__(self) -> Table:
        if time.monotonic() - self._at > 1:  # looking at the disk more often tells nothing
            self._shown, self._at = self.state(), time.monotonic()
        done, failed, text = self._shown
        table = Table.grid(padding=(0, 1))
        table.add_row(
            ProgressBar(max(1, self.watch.expected), done + failed, width=30), Text(text, overflow="ellipsis")
        )
        return table

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The bar, for the block."""
        if not self.live:
            yield
            return
        with Live(self, console=self.console, refresh_per_second=2):
            yield

    @contextlib.contextmanager
    def polling(self, every: float = 10.0) -> Iterator[None]:
        """For the block, a line whenever the counts changed, where no bar shows them."""
        over = threading.Event()

        def look() -> None:
            shown = self.state()[:2]
            while not over.wait(every):
                done, failed, text = self.state()
                if (done, failed) != shown:
                    self.say(text)
                shown = done, failed

        thread = threading.Thread(target=look, daemon=True)
        if not self.live:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()

    def table(self, results: Mapping[str, Any]) -> None:
        """The report's table, on the terminal."""
        if not results["trains"]:
            return
        several = any(len(cell["runs"]) > 1 for cell in results["cells"])
        heads = [f"{results['split']} {results['metric']}", *(["95% interval", "p"] if several else [])]
        table = Table(box=None, pad_edge=False, title=results["title"], title_justify="left")
        for head in ("arm", *heads, "lr", "parameters", "FLOPs", "train seconds"):
            table.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True)
        for cell in results["cells"]:
            found, interval, _, p, rate = scores(cell)
            costs = cell["costs"]
            seconds = [run["seconds"] for run in cell["runs"]]
            table.add_row(
                cell["label"],
                found,
                *([interval, p] if several else []),
                rate,
                f"{costs['parameters']:,}" if "parameters" in costs else "",
                si(costs.get("flops")),
                f"{sum(seconds) / len(seconds):.1f}" if seconds else "",
            )
        self.console.print(table, width=None if self.console.is_terminal else 140, soft_wrap=False)
        if not several:
            self.say("One seed: no interval, and no telling of chance from a difference; seed=0,1,2 makes three.")

    def event(self, what: str, job: Job | None) -> None:
        """A run of this process started or ended."""
        if job is None or what not in ("done", "failed"):
            return
        done, failed, text = self.state()
        if what == "done":
            summary = report.read_json(job.folder / "summary.json")
            outcome = f"{summary['split']} {summary['metric']} {float(summary['value']):.4f}"
            outcome += f", {duration(summary['train_seconds'])}"
        else:
            outcome = "FAILED: " + self.watch.board.failed.get(job.identity, {}).get("error", "")[:300]
        self._shown = done, failed, text
        self.say(f"{job.label}: {outcome}   [{text.partition('   ')[0]}]")
