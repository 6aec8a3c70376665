"""`report --watch`: the page is written again whenever a cell of the store ends, until its grids have ended."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capacity_gap.report.content import Content, gather
from capacity_gap.report.page import Watched, render, title_of, watched_page
from capacity_gap.report.rounds import stop_words
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.settings.places import TOOL_WORDS, user_path
from capacity_gap.settings.scales import counted
from capacity_gap.store.contents import NOT_STARTED, end_of, open_store, rounds_of, stopped_cells, sweeps
from capacity_gap.store.files import is_store, write_text
from capacity_gap.store.stage import Store

EVERY_S = 15
CHANGING = ("record", "failed", "sweeps")  # folders of a store whose times change with every cell that ends
IDLE_S = 300  # so long after the last cell that ended it is said that nothing runs
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
        progress: the state of each cell: done, running, waiting or failed, and the stages that are being computed
            (`runner.progress` gives both).
        every_s: seconds between two looks.
        options: of `gather`.
        sleep: waits so many seconds.
        say: prints a line.
        missing: cells that failed or were left when all grids had ended.
    """

    source: str
    out: Path
    sweep: str | None
    progress: Callable[[Store, Mapping[str, Any]], tuple[Mapping[str, str], Collection[str]]]
    every_s: int = EVERY_S
    options: Mapping[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = print
    missing: int = 0
    stages: Collection[str] = ()  # that were being computed at the last look: several cells may share one
    plain: str = ""  # the page as it stays when nobody watches any more

    def run(self) -> Content:
        """Follows until every grid has ended, or until Ctrl-C; the last page does not load itself again."""
        store = open_store(self.source)
        if self.sweep:
            choose("--sweep", self.sweep, sweeps(store))
        content, seen, before, waits, idle_s = None, None, False, True, 0.0
        states: dict[str, Mapping[str, str]] = {}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                now, took = self._seen(store), 0.0
                idle_s = 0.0 if now != seen else idle_s
                # A look at every cell costs more. A cell that waits changes `now` first; one that only seems to run,
                # because its process died, changes nothing.
                if now != seen or before or not waits:
                    states = self._states(store)
                    waits = _waits(store, states)
                if now != seen or content is None:
                    began = time.monotonic()
                    content = self._write(_counts(states))
                    seen, took = now, time.monotonic() - began
                # Twice, since a cell that failed may be started again by its grid.
                ended = not waits and self._ended(store, states)
                if ended and before:
                    self.say(self._end(store, states, content))
                    break
                before = ended
                pause = max(self.every_s, RESTS * took)
                if idle_s < IDLE_S <= idle_s + pause:
                    self._say_idle(store)
                idle_s += pause
                self.sleep(pause)
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

    def _states(self, store: Store) -> dict[str, Mapping[str, str]]:
        """The state of each cell, by grid."""
        grids = {name: cells for name, cells in sweeps(store).items() if self.sweep in (None, name)}
        every: dict[str, Any] = {}
        for cells in grids.values():
            every |= cells
        found, self.stages = self.progress(store, every)
        return {name: {key: found[key] for key in cells} for name, cells in grids.items()}

    def _end(self, store: Store, states: Mapping[str, Mapping[str, str]], content: Content) -> str:
        """Why nothing runs any more, in a sentence, and what to do about cells that are missing."""
        counts = _counts(states)
        self.missing = counts["failed"] + counts["waiting"]
        parts = [f"{counted(counts['failed'], 'cell')} failed"] if counts["failed"] else []
        unstarted = int((content.failed["error"] == NOT_STARTED).sum()) if "error" in content.failed else 0
        if parts and unstarted:
            parts[0] += f", {unstarted} of them not started because of fail_fast"
        for name, cells in states.items():
            parts += stop_words(name, stopped_cells(store, name), cells)
        tool = f"{' '.join(TOOL_WORDS)} status {store.root} --failed"
        hint = f". `{tool}` says why cells failed and how to run them again" if counts["failed"] else ""
        return "every grid has ended" + (f": {'; '.join(parts)}{hint}." if parts else "")

    def _ended(self, store: Store, states: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether nothing runs, and grids in rounds were stopped or say that they have ended."""
        if not states or _counts(states)["running"] or self.stages:
            return False
        return all(end_of(store, name) or stopped_cells(store, name) or not rounds_of(store, name) for name in states)

    def _say_idle(self, store: Store) -> None:
        """Says that nothing runs, where cells wait: a grid that was killed leaves no word."""
        counts = _counts(self._states(store))
        if counts["waiting"] and not counts["running"] and not self.stages:
            self.say(
                f"nothing runs, and {counts['waiting']} of the cells wait: their jobs are queued, or the grid was "
                "killed. If it was, Ctrl-C ends this; the grid's command goes on from what is there."
            )


def _waits(store: Store, states: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a process may still come to a cell that waits."""
    return any(
        {key for key, state in cells.items() if state == "waiting"} - stopped_cells(store, name).keys()
        for name, cells in states.items()
    )


def _counts(states: Mapping[str, Mapping[str, str]]) -> Counter:
    """Cells by state; one that several grids share counts once."""
    every: dict[str, str] = {}
    for cells in states.values():
        every |= cells
    return Counter(every.values())


def progress_words(counts: Mapping[str, int]) -> str:
    """`7 of 10 cells done, 1 failed, 2 waiting.`"""
    parts = [f"{counts[state]} {state}" for state in ("failed", "running", "waiting") if counts.get(state)]
    return ", ".join([f"{counts.get('done', 0)} of {sum(counts.values())} cells done", *parts]) + "."


def _time_of(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0
