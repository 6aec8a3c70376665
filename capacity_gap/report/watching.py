"""`report --watch`: the page is written again whenever a cell of the store ends, until its grids have ended."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capacity_gap.report.content import Content, gather
from capacity_gap.report.page import Watched, render, title_of, watched_page
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.settings.places import user_path
from capacity_gap.store.contents import end_of, open_store, rounds_of, sweeps
from capacity_gap.store.files import is_store, write_text
from capacity_gap.store.stage import Store

EVERY_S = 15
CHANGING = ("record", "failed", "sweeps")  # folders of a store whose times change with every cell that ends
RESTS = 3  # times as long as writing took passes before it is written again


def check_watched(source: str) -> None:
    """Raises `ConfigError` where nothing could be watched: a table does not grow by itself."""
    if not is_store(user_path(source)):
        raise ConfigError(f"--watch follows a store while its grids run; {source} is none. Leave --watch out.")


@dataclass
class Follower:
    """Writes the page of a store again and again.

    Attributes:
        source: the store.
        out: the page.
        sweep: only this grid.
        progress: what is said of cells by name of their state (`runner.progress` gives it).
        every_s: seconds between two looks.
        options: of `gather`.
        sleep: waits so many seconds.
        say: prints a line.
    """

    source: str
    out: Path
    sweep: str | None
    progress: Callable[[Store, Mapping[str, Any]], Mapping[str, int]]
    every_s: int = EVERY_S
    options: Mapping[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = print
    plain: str = ""  # the page as it stays when nobody watches any more

    def run(self) -> Content:
        """Follows until every grid has ended, or until Ctrl-C; the last page does not load itself again."""
        store = open_store(self.source)
        if self.sweep:
            choose("--sweep", self.sweep, sweeps(store))
        content, seen, before = None, None, False
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                now, took = self._seen(store), 0.0
                counts = self._counts(store) if now != seen or before else None
                if now != seen or content is None:
                    began = time.monotonic()
                    content = self._write(counts or self._counts(store))
                    seen, took = now, time.monotonic() - began
                # Twice, since a cell that failed may be started again by its grid.
                ended = counts is not None and self._ended(store, counts)
                if ended and before:
                    self.say("every grid has ended")
                    break
                before = ended
                self.sleep(max(self.every_s, RESTS * took))
        except KeyboardInterrupt:
            if content is None:
                raise
            self.say("stopped; the grids go on")
        write_text(self.out, self.plain)  # at once: nothing is rendered again after Ctrl-C
        return content

    def _seen(self, store: Store) -> tuple[int, ...]:
        """What changes with every cell that ends, at the cost of three looks at a folder."""
        return tuple(_time_of(store.root / name) for name in CHANGING)

    def _write(self, counts: Mapping[str, int]) -> Content:
        content = gather(self.source, sweep=self.sweep, **self.options)
        said = progress_words(counts)
        watched = Watched(time.strftime("%Y-%m-%d %H:%M:%S"), said, self.every_s)
        self.plain = render(content, title=title_of(content, self.source, self.sweep))
        write_text(self.out, watched_page(self.plain, watched))
        self.say(f"{watched.written} {said}")
        return content

    def _grids(self, store: Store) -> dict[str, dict[str, Any]]:
        return {name: cells for name, cells in sweeps(store).items() if self.sweep in (None, name)}

    def _counts(self, store: Store) -> Mapping[str, int]:
        cells: dict[str, Any] = {}
        for found in self._grids(store).values():
            cells |= found
        return self.progress(store, cells)

    def _ended(self, store: Store, counts: Mapping[str, int]) -> bool:
        """Whether nothing runs or waits, and grids in rounds say that they have ended."""
        grids = self._grids(store)
        if not grids or counts.get("running", 0) or counts.get("waiting", 0):
            return False
        return all(end_of(store, name) or not rounds_of(store, name) for name in grids)


def progress_words(counts: Mapping[str, int]) -> str:
    """`7 of 10 cells done, 1 failed, 2 waiting.`"""
    parts = [f"{counts[state]} {state}" for state in ("failed", "running", "waiting") if counts.get(state)]
    return ", ".join([f"{counts.get('done', 0)} of {sum(counts.values())} cells done", *parts]) + "."


def _time_of(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0
