"""A grid in rounds: of its cells those run first that narrow an answer most per second, until it is narrow enough.

Every round is noted in the store before it runs, with the answer so far and a reason for each cell. The same command
first finishes a round that was cut short, and goes on from there. Imports no torch.
"""

import math
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.pipeline import Cell
from capacity_gap.report.next_pool import EQUAL, check_inside
from capacity_gap.report.rounds import answer_text, question_words, reasons, round_line, stopped_text
from capacity_gap.runner.machines import Worker
from capacity_gap.runner.noted_answers import both_answers, ends_of
from capacity_gap.runner.plan import noted_cell
from capacity_gap.runner.plan_lines import format_hours
from capacity_gap.runner.speed import Speed, speed
from capacity_gap.runner.waves import Crew
from capacity_gap.settings.errors import ConfigError, Damaged, UserError
from capacity_gap.settings.places import TOOL_WORDS
from capacity_gap.settings.scales import counted, parse_tokens
from capacity_gap.store.contents import forget_end, narrow_level, note_end, rounds_of
from capacity_gap.store.files import META, NUMBER, read_json
from capacity_gap.store.stage import Stage, Store, closure

if TYPE_CHECKING:
    import pandas as pd

    from capacity_gap.fit import Candidate, Goal
    from capacity_gap.fit.regression import Estimate

Cells = Mapping[str, tuple[Cell, list[str]]]  # by digest: a cell and the overrides that make it
NO_ROUNDS = "a grid run in rounds, or cut to a budget, may vary only student, teacher, budget and seeds"
NARROW = "  narrow enough, but rounds end only after 24 cells and two narrow answers in a row (docs/next.md)"
SECOND = 1e-3  # the least a cell costs: one whose stages are all there costs next to nothing


@dataclass(frozen=True)
class Round:
    """What is run next, and why."""

    number: int
    cells: Mapping[str, tuple[Cell, list[str]]]
    reasons: Mapping[str, str]  # by digest
    before: "Estimate | None"  # the answer so far; None while there is none
    gain: float
    device_hours: float
    noted: bool = False  # in the store, by a command that was cut short
    narrow: bool = False  # the answer is as narrow as was asked for, once or by few cells

    def note(self, what: str) -> dict[str, Any]:
        """For the store, besides the cells; an open end of an interval is null."""
        return {
            "round": self.number,
            "what": what,
            "answer": ends_of(self.before),
            "gain": self.gain,
            "device_hours": self.device_hours,
        }

    def lines(self, what: str) -> list[str]:
        """The round as text."""
        shown = {**self.note(what), "cells": {d: {"reason": r} for d, r in self.reasons.items()}}
        return [round_line(shown), *([NARROW] * self.narrow), *(f"  {reason}" for reason in reasons(shown))]


@dataclass(frozen=True, eq=False)
class Rounds:
    """The rounds of one grid. Iterating gives what is to be run now, until there is a reason to end."""

    cells: Cells
    store: Store
    name: str
    worker: Worker
    planned_speed: Speed  # before anything was run

    def check(self) -> None:
        """Raises `ConfigError` where the goal cannot be estimated because cells differ in other settings."""
        import pandas as pd

        from capacity_gap.fit.goal_answer import LEAST_CELLS
        from capacity_gap.fit.joint_fit import check_alike

        if self.config.until and len(self.cells) < LEAST_CELLS:
            raise ConfigError(
                f"until={self.config.until:g} cannot end rounds of this grid: they end at a narrow interval only after "
                f"{LEAST_CELLS} cells, and it has {len(self.cells)}. Leave out until=, or add seeds or sizes."
            )
        told = pd.DataFrame([cell.description for cell, _ in self.cells.values()])
        try:
            check_alike(told)
        except ValueError as error:
            raise ConfigError(f"{NO_ROUNDS}: {error}") from error
        check_inside(self.goal, told, told, key="next.")
        rows = pool_rows(self.cells).drop(columns="cell")
        if (twice := rows.duplicated(keep=False)).any():
            first = told[twice & (rows == rows[twice].iloc[0]).all(axis=1)]
            differ = [str(c) for c in told if first[c].astype(str).nunique() > 1]
            raise ConfigError(
                f"{NO_ROUNDS}: cells of one student, teacher, budget and seed differ in {', '.join(differ)}."
            )

    def run(self, crew: Crew) -> dict[str, tuple[Cell, list[str]]]:
        """Runs round after round; returns the cells of all of them."""
        noted_level = narrow_level(self.store, self.what, among=self._keys)
        forget_end(self.store, self.name, self.what)
        try:
            for found in self:
                noted = self._noted(found)
                if not found.noted:
                    crew.note(noted, found.note(self.what))
                print("\n".join(found.lines(self.what)), flush=True)
                crew.run(found.cells, noted)
                if self.config.fail_fast and crew.causes:
                    raise StopRounds("fail_fast=true, and a cell failed")
        except StopRounds as end:
            noted_level = 0.0 if end.narrow and noted_level is None else noted_level
            so_far, stopped = both_answers(self.frame(), self.goal, noted_level, ended=end.narrow)
            print(f"ended: {end}\n{answer_text(so_far, self.what)}{stopped_text(stopped)}", flush=True)
            if self.noted():
                note_end(self.store, self.name, self.what, str(end), so_far, stopped)
        run = {key for part in self.noted() for key in part["cells"]}
        return {digest: given for digest, given in self.cells.items() if given[0].record.key in run}

    def planned(self) -> list[str]:
        """The next round as text; nothing is started."""
        try:
            return next(iter(self)).lines(self.what)
        except StopRounds as end:
            return [f"no further round: {end}"]

    def speed(self) -> Speed:
        """Of a worker, as measured by now."""
        shared = {s.name for cell, _ in self.cells.values() for s in closure(cell.record).values() if s.collective}
        return speed(self.store, self.worker, throughput=self.config.throughput, collective=shared)[0]

    def _noted(self, found: Round) -> dict[str, dict[str, Any]]:
        """What the store keeps on a round's cells: also why each was chosen, and which stages it makes."""
        notes = {}
        for digest, (cell, overrides) in found.cells.items():
            made = [key for key, stage in closure(cell.record).items() if not self.store.has(stage)]
            note = noted_cell(cell, overrides, self.planned_speed)
            notes[cell.record.key] = {**note, "reason": found.reasons[digest], "made": made}
        return notes

    @property
    def config(self) -> RunConfig:
        """Of any cell: what the rounds are for is the same in all."""
        return next(iter(self.cells.values()))[0].config

    @cached_property
    def _keys(self) -> set[str]:
        """Of the records of the grid's cells."""
        return {cell.record.key for cell, _ in self.cells.values()}

    @cached_property
    def goal(self) -> "Goal":
        """The quantity to estimate."""
        from capacity_gap.fit import Goal

        asked, sizes = self.config.next, self.config.next.sizes
        ladder = next(iter(self.cells.values()))[0].family
        if asked.student:
            sizes["student_params"] = student = ladder.student_params(int(sizes["student_params"]))
            if asked.data:
                sizes["data_tokens"] = parse_tokens(asked.data, params=student, key="next.data")
        for name in ("small", "large"):
            if given := getattr(asked, name):
                sizes[name] = ladder.size(given, key=f"next.{name}")
        return Goal(asked.goal, **sizes)

    @cached_property
    def what(self) -> str:
        """The answer's name."""
        return question_words(self.goal)

    def __iter__(self) -> Iterator[Round]:
        """Raises `StopRounds` with the reason at the end."""
        if left := self.unfinished():
            yield left
        tried = set(left.cells) if left else set()
        while True:
            found = self.next(tried)
            tried |= found.cells.keys()
            yield found

    def noted(self) -> list[dict[str, Any]]:
        """The rounds of this question over these cells, first to last: a name may have others in the store."""
        rounds = rounds_of(self.store, self.name)
        return [part for part in rounds if part.get("what") == self.what and self._keys & part["cells"].keys()]

    def unfinished(self) -> Round | None:
        """The cells of noted rounds that are not there yet: of a command that was cut short."""
        noted = self.noted()
        keys = {key: cell for part in noted for key, cell in part["cells"].items()}
        left = {
            digest: given
            for digest, given in self.cells.items()
            if given[0].record.key in keys and not self.store.finished(given[0].record)
        }
        if not left:
            return None
        reasons = {digest: keys[given[0].record.key].get("reason", "") for digest, given in left.items()}
        return Round(noted[-1]["round"], left, reasons, self.answer(), 0.0, self.hours(left), noted=True)

    def next(self, tried: set[str]) -> Round:
        """The next round.

        Args:
            tried: digests of cells that were run by this process: those that failed are not chosen again.

        Raises:
            StopRounds: there is a reason to end.
        """
        from capacity_gap.fit import next_cells
        from capacity_gap.fit.goal_answer import answer, narrow_enough, narrow_twice, too_little

        frame, config, pace = self.frame(), self.config, self.speed()
        so_far = answer(frame, self.goal)
        if narrow_twice(self._last(), so_far, len(frame), config.until):
            said = f"the interval is narrow enough, before and after the last round: until={config.until:g}"
            raise StopRounds(said, narrow=True)
        pool = {d: c for d, c in self.cells.items() if d not in tried and not self.store.finished(c[0].record)}
        pool = {d: c for d, c in pool.items() if c[0].description["teacher_params"] > EQUAL * c[0].student_target}
        if not pool:
            raise StopRounds(f"no cell is left to run{self._lacking(so_far)}")
        try:
            found = next_cells(frame, pool_rows(pool), goal=self.goal, k=config.next.k, cost=self._bill(pace))
        except ValueError as error:
            raise error if isinstance(error, UserError) else ConfigError(str(error)) from error
        gain = sum(c.gain for c in found)
        if too_little(gain, so_far):
            best = f"the best {counted(len(found), 'cell')} would remove {gain:.1%} of the variance"
            raise StopRounds(f"no remaining cell would help: {best}{self._lacking(so_far)}")
        found = self._affordable(found, pace)
        chosen = self._named(found)
        reasons = {digest: c.reason for digest, c in zip(chosen, found, strict=True)}
        number = max((part["round"] for part in rounds_of(self.store, self.name)), default=0) + 1
        gain, hours = sum(c.gain for c in found), self.hours(chosen, pace)
        return Round(number, chosen, reasons, so_far, gain, hours, narrow=narrow_enough(so_far, config.until))

    def _lacking(self, so_far: "Estimate | None") -> str:
        """What a grid lacks that has not decided; empty where it has."""
        if so_far is not None and so_far.interval[0] > 0 and so_far.interval[1] < math.inf:
            return ""
        pairs = {(c.description["teacher"], c.description["teacher_seed"]) for c, _ in self.cells.values()}
        once = len(pairs) == len({teacher for teacher, _ in pairs})
        more = "teachers trained with other seeds (teacher_seed=${seed}), and teachers" if once else "teachers"
        return f"; the interval is open, so this grid is not enough: add {more} of other sizes. {self._outside()}"

    def _outside(self) -> str:
        """The command that names cells beyond this grid."""
        asked = self.config.next
        given = {name: getattr(asked, name) for name in ("student", "data", "small", "large")}
        words = [f"--goal {asked.goal}", *(f"--{name} {value}" for name, value in given.items() if value)]
        return f"{' '.join(TOOL_WORDS)} next {shlex.quote(self.config.store)} {' '.join(words)} names cells beyond it"

    def _last(self) -> "Estimate | None":
        """The answer before the last round."""
        from capacity_gap.fit.regression import Estimate

        noted = self.noted()
        if not noted or not (ends := noted[-1].get("answer")):
            return None
        value, low, high = (math.nan if x is None else float(x) for x in ends)
        return Estimate(value, (0.0 if math.isnan(low) else low, math.inf if math.isnan(high) else high))

    def within(self, hours: float) -> dict[str, tuple[Cell, list[str]]]:
        """The part of the grid that narrows the goal most and needs no more device-hours.

        Raises:
            ValueError: there is none.
        """
        from capacity_gap.fit import within_budget

        seconds = hours * 3600 / self.worker.devices
        bill = self._bill(self.speed())
        found = within_budget(self.frame(), pool_rows(self.cells), goal=self.goal, budget=seconds, cost=bill)
        return self._named(found)

    def _named(self, found: "list[Candidate]") -> dict[str, tuple[Cell, list[str]]]:
        """The cells that candidates stand for, by digest."""
        return {digest: self.cells[digest] for digest in (str(c.cell["cell"]) for c in found)}

    def _affordable(self, found: "list[Candidate]", pace: Speed) -> "list[Candidate]":
        """The first cells that the budget still holds.

        Raises:
            StopRounds: it holds none.
        """
        if self.config.budget_hours is None:
            return found
        left = self.config.budget_hours - self.spent_hours()
        for count in range(len(found), 0, -1):
            if self.hours(self._named(found[:count]), pace) <= left:
                return found[:count]
        cost = self.hours(self._named(found[:1]), pace)
        raise StopRounds(
            f"the budget is used up: {format_hours(max(0.0, left))} hours of "
            f"budget_hours={self.config.budget_hours:g} are left, but the next cell takes {format_hours(cost)}"
        )

    def frame(self) -> "pd.DataFrame":
        """The finished cells of this grid."""
        from capacity_gap.records import read, to_frame

        done = {d for d, (cell, _) in self.cells.items() if self.store.finished(cell.record)}
        frame = to_frame(read(self.store.root))
        return frame[frame["cell"].isin(done) & (frame["status"] == "done")].reset_index(drop=True)

    def answer(self) -> "Estimate | None":
        """The answer so far, with its 95 % interval; None while the cells are too few."""
        from capacity_gap.fit.goal_answer import answer

        return answer(self.frame(), self.goal)

    def _bill(self, pace: Speed) -> Callable[[Mapping[str, Any]], tuple[float, Mapping[Hashable, float]]]:
        """What cells cost: seconds of their own stages, and of those that others of the grid need too and the store
        lacks."""
        there: dict[str, bool] = {}

        def seconds(stage: Stage) -> float:
            if stage.key not in there:
                there[stage.key] = self.store.has(stage)
            return 0.0 if there[stage.key] else pace.seconds(stage)

        def cost(row: Mapping[str, Any]) -> tuple[float, Mapping[Hashable, float]]:
            stages = closure(self.cells[str(row["cell"])][0].record)
            own = sum(seconds(s) for k, s in stages.items() if k not in self._shared)
            return max(SECOND, own), {(s.name, k): seconds(s) for k, s in stages.items() if k in self._shared}

        return cost

    @cached_property
    def _shared(self) -> set[str]:
        """Stages that several cells of the grid need."""
        return _common(self.cells)

    def hours(self, cells: Cells, pace: Speed | None = None) -> float:
        """Device-hours of what these cells lack; `pace`: where it is measured already."""
        stages: dict[str, Stage] = {}
        for cell, _ in cells.values():
            stages |= closure(cell.record)
        pace = pace or self.speed()
        return sum(pace.seconds(s) for s in stages.values() if not self.store.has(s)) * self.worker.devices / 3600

    def spent_hours(self) -> float:
        """Device-hours that the rounds took: what their stages took, or were thought to where that is not known."""
        made: dict[str, float] = {}
        for part in self.noted():
            for cell in part["cells"].values():
                made.update({key: cell["stages"][key] for key in cell.get("made", ())})
        return sum(self._took(key, planned) for key, planned in made.items()) * self.worker.devices / 3600

    def _took(self, key: str, planned: float) -> float:
        try:
            meta = read_json(self.store.root / key / META, {"wall_s": NUMBER})
        except (OSError, Damaged):
            return 0.0  # not made yet
        return max(planned, float(meta["wall_s"])) if meta.get("resumed") else float(meta["wall_s"])


class StopRounds(Exception):
    """Why no further round is run. `narrow`: an interval was narrow enough, and so it is narrow partly by chance."""

    def __init__(self, said: str, *, narrow: bool = False) -> None:
        super().__init__(said)
        self.narrow = narrow


def pool_rows(cells: Cells) -> "pd.DataFrame":
    """Candidates as `next_cells` takes them, each with its digest in `cell`."""
    import pandas as pd

    names = ("student", "teacher", "data_tokens", "seed", "teacher_seed", "student_params", "teacher_params")
    return pd.DataFrame([{"cell": d, **{k: c.description[k] for k in names}} for d, (c, _) in cells.items()])


def _common(cells: Cells) -> set[str]:
    seen: set[str] = set()
    shared: set[str] = set()
    for cell, _ in cells.values():
        keys = closure(cell.record).keys()
        shared |= seen & keys
        seen |= keys
    return shared
