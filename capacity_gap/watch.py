"""Progress of a grid as the store shows it: what runs, how far it is, and about how long the rest will take."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from capacity_gap.stage import Stage, Store, closure

EVERY_S = 1.0
PLAIN_EVERY_S = 10.0


class Watch:
    """Shows a bar in a terminal, and a line now and then elsewhere, while the grid runs."""

    def __init__(self, store: Store, targets: Sequence[Stage]) -> None:
        self.store = store
        self.stages: dict[str, Stage] = {}
        for target in targets:
            self.stages.update({k: s for k, s in closure(target).items() if not store.has(s)})
        self.total = sum(s.cost for s in self.stages.values())
        self.label = ""
        self.started = self.shown = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def wave(self, name: str, jobs: int) -> None:
        """Says which wave is running now."""
        self.label = f"{name} ({jobs})"

    def done(self) -> float:
        """Work done, in the unit of `Stage.cost`: whole stages, and the finished share of running ones."""
        whole = sum(s.cost for s in self.stages.values() if self.store.has(s))
        running = 0.0
        for file in self.store.work.glob("*/*/progress.json"):
            try:
                state = json.loads(file.read_text())
            except (OSError, json.JSONDecodeError):
                continue  # being replaced or just removed
            stage = self.stages.get(state["stage"])
            if stage and not self.store.has(stage):
                running += stage.cost * state["done"] / max(1, state["total"])
        return whole + running

    def _loop(self) -> None:
        if sys.stdout.isatty():
            self._bar()
        else:
            while not self._stop.wait(PLAIN_EVERY_S):
                self._line()

    def _bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}")) as progress:
            task = progress.add_task("", total=max(self.total, 1), left="")
            while not self._stop.wait(EVERY_S):
                done = self.done()
                progress.update(task, completed=done, description=self.label, left=self._left(done))
            progress.update(task, completed=self.done(), left="")

    def _line(self) -> None:
        done = self.done()
        finished = sum(self.store.has(s) for s in self.stages.values())
        share = f"{finished}/{len(self.stages)} stages, {done / max(1, self.total):.0%}"
        print(f"  {self.label}: {share}, {self._left(done)}", flush=True)

    def _left(self, done: float) -> str:
        if done <= 0:
            return "…"
        seconds = (time.monotonic() - self.started) * (self.total - done) / done
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {max(0, seconds):.0f} s left"
