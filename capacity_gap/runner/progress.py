"""How far a grid is, as the store shows it: the live table, and `python -m capacity_gap status` from any machine."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from capacity_gap.runner.plan_lines import format_seconds
from capacity_gap.store.contents import failure_file
from capacity_gap.store.files import NUMBER, read_json
from capacity_gap.store.lease import PATIENCE_S
from capacity_gap.store.stage import Store

EVERY_S = 1.0
PLAIN_EVERY_S = 10.0
SOON, SOON_S = 0.02, 300.0  # the share done, or the seconds, from which the time left can be told
AT = 4  # running stages that a plain line names
STATES = ("done", "running", "waiting", "failed")


@dataclass(frozen=True)
class Running:
    """A stage that is being computed."""

    key: str
    share: float  # of its steps
    elapsed_s: float
    owner: str


@dataclass(frozen=True)
class Snapshot:
    """A grid at one moment."""

    cells: dict[str, str]  # record key → one of STATES
    kinds: dict[str, tuple[int, int]]  # kind of stage → finished, in all
    running: list[Running]
    effort_done: float
    effort: float

    @property
    def counts(self) -> Counter:
        """Cells by state."""
        return Counter(self.cells.values())

    @property
    def share(self) -> float:
        """Of the whole effort that is done."""
        return min(1.0, self.effort_done / self.effort) if self.effort else 1.0


@dataclass
class View:
    """Looks at the cells of one grid again and again; what was once finished is not looked for again.

    Args:
        store: where the cells are made.
        cells: by record key, each with its `name` and its `stages`: key → effort.
    """

    store: Store
    cells: Mapping[str, Mapping[str, Any]]
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.effort: dict[str, float] = {}
        shared: Counter = Counter()
        for cell in self.cells.values():
            self.effort.update(cell["stages"])
            shared.update(set(cell["stages"]))
        self.shared = {key for key, n in shared.items() if n > 1}

    def snapshot(self) -> Snapshot:
        """The grid as it is now."""
        for key in self.effort.keys() - self.finished:
            if (self.store.root / key / "stage.json").exists():
                self.finished.add(key)
        running = {r.key: r for r in self._running()}
        kinds: dict[str, tuple[int, int]] = {}
        for key in self.effort:
            done, total = kinds.get(key.split("/")[0], (0, 0))
            kinds[key.split("/")[0]] = (done + (key in self.finished), total + 1)
        effort = sum(self.effort.values())
        done_effort = sum(self.effort[k] for k in self.finished)
        done_effort += sum(self.effort[k] * r.share for k, r in running.items())
        states = {key: self._state(key, cell, running) for key, cell in self.cells.items()}
        return Snapshot(states, kinds, sorted(running.values(), key=lambda r: r.key), done_effort, effort)

    def _state(self, key: str, cell: Mapping[str, Any], running: Mapping[str, Running]) -> str:
        if key in self.finished:
            return "done"
        if any(s in running and s not in self.shared for s in cell["stages"]):
            return "running"
        return "failed" if failure_file(self.store, key).exists() else "waiting"

    def _running(self) -> list[Running]:
        now = _file_clock(self.store.work)
        found = []
        for key in self.effort.keys() - self.finished:
            place = self.store.work / key.replace("/", "-")
            try:
                lease = place / "lease.json"
                owner = read_json(lease, {"owner": str})["owner"]
                if now - lease.stat().st_mtime > PATIENCE_S:
                    continue  # its owner is dead
            except OSError:
                continue  # no process is working on it
            found.append(_progress(key, place / owner / "progress.json", owner))
        return found


def _progress(key: str, file: Path, owner: str) -> Running:
    try:
        state = read_json(file, {"done": NUMBER, "total": NUMBER, "elapsed_s": NUMBER})
    except OSError:
        return Running(key, 0.0, 0.0, owner)
    return Running(key, state["done"] / max(1, state["total"]), state["elapsed_s"], owner)


def _file_clock(folder: Path) -> float:
    """The file system's current time: it may be on another machine, with another clock."""
    probe = folder / f".clock-{threading.get_native_id()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # a store that may only be read
        return time.time()
    return now


class Watch:
    """Shows a live table in a terminal, and a line now and then elsewhere, while a grid or a cell runs."""

    def __init__(self, view: View, *, reused: int = 0, label: str = "") -> None:
        self.view = view
        self.reused = reused
        self.label = label
        self.started = time.monotonic()
        self.first = view.snapshot().effort_done
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
        self.label = f"wave {name} ({jobs})"

    def _loop(self) -> None:
        if sys.stdout.isatty():
            from rich.live import Live

            with Live(self._table(), refresh_per_second=4, transient=True) as live:
                while not self._stop.wait(EVERY_S):
                    live.update(self._table())
        else:
            while not self._stop.wait(PLAIN_EVERY_S):
                now = self.view.snapshot()
                stages = f"{sum(d for d, _ in now.kinds.values())}/{sum(n for _, n in now.kinds.values())} stages"
                cells = ", ".join(f"{now.counts[s]} {s}" for s in STATES if now.counts[s])
                at = "".join(f", {r.key.partition('/')[0]} {r.share:.0%}" for r in now.running[:AT])
                print(f"  {self.label}: {now.share:.0%}, {stages}{at}, cells {cells}; {self._left(now)}", flush=True)

    def _table(self) -> Any:
        now = self.view.snapshot()
        title = f"{self.label} · {now.share:.0%} · {self._left(now)}"
        return table(now, self.view.cells, title=title, reused=self.reused)

    def _left(self, now: Snapshot) -> str:
        done, elapsed = now.effort_done - self.first, time.monotonic() - self.started
        if done <= 0 or (done < SOON * (now.effort - self.first) and elapsed < SOON_S):
            return "…"
        seconds = elapsed * (now.effort - now.effort_done) / done
        return f"about {format_seconds(max(0.0, seconds))} left"


def table(now: Snapshot, cells: Mapping[str, Mapping[str, Any]], *, title: str, reused: int = 0) -> Any:
    """A grid as a table for the terminal: cells by state, stages by kind, and what runs."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    counts = [f"{now.counts[s]} {s}" for s in STATES if now.counts[s]] + ([f"{reused} reused"] if reused else [])
    kinds = [f"{kind} {done}/{total}" for kind, (done, total) in now.kinds.items()]
    rows = Table.grid(padding=(0, 2))
    for r in now.running:
        rows.add_row(
            Text(f"  {_belongs(r.key, cells)}"),
            ProgressBar(total=1.0, completed=r.share, width=24),
            f"{r.share:.0%}",
            format_seconds(r.elapsed_s),
        )
    return Group(
        Text(title, style="bold"), Text("cells   " + ", ".join(counts)), Text("stages  " + ", ".join(kinds)), rows
    )


def _belongs(key: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
    """A stage by its kind and the cell that it is for, or how many share it."""
    mine = [cell["name"] for cell in cells.values() if key in cell["stages"]]
    kind, _, digest = key.partition("/")
    return f"{kind} · {mine[0]}" if len(mine) == 1 else f"{kind} {digest[:6]} · shared by {len(mine)} cells"
