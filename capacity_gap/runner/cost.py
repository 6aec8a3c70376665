"""The breakdown of a grid's time: each teacher, each curve, held-out evaluation; and when the last job ends.

A curve is a student at a budget, under all its teachers. Imports no torch.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capacity_gap.cell.pipeline import Cell, in_waves
from capacity_gap.models.accounting import signal_bytes_per_token, stored_bytes
from capacity_gap.models.axes import dims
from capacity_gap.store.stage import Stage, closure

Seconds = Callable[[Stage], float]
TEACHER = ("teacher", "published", "expand", "adapt")
SHARED = ("corpus", "tokenizer", "vocabulary", "tokens", "instructions", "suite")


@dataclass
class Curve:
    """One student at one budget."""

    teachers: set[str] = field(default_factory=set)
    cells: int = 0
    seconds: float = 0.0


@dataclass
class Costs:
    """Seconds of what is still to run, by teacher and curve."""

    teachers: dict[str, dict[str, float]] = field(default_factory=dict)  # by rung: training, scoring, signal
    curves: dict[tuple[int, int], Curve] = field(default_factory=dict)  # by student and budget
    models: int = 0  # that are scored on held-out text
    evaluation: float = 0.0
    text: float = 0.0

    @property
    def total(self) -> float:
        """Of one worker."""
        spent = [s for parts in self.teachers.values() for s in parts.values()]
        return sum(spent) + sum(c.seconds for c in self.curves.values()) + self.evaluation + self.text


def costs(cells: Sequence[Cell], left: Mapping[str, Stage], seconds: Seconds) -> Costs:
    """Adds up the stages that are `left`, each once: stages that a teacher needs count for that teacher."""
    found, open_ = Costs(), dict(left)
    for cell in cells:
        for rung, part, stage in _teachers(cell):
            spent = found.teachers.setdefault(rung, {"training": 0.0, "scoring": 0.0, "signal": 0.0})
            if open_.pop(stage.key, None):
                spent[part] += seconds(stage)
    for cell in cells:
        curve = found.curves.setdefault((cell.student_scale, cell.data_tokens), Curve())
        curve.teachers.add(cell.rung)
        curve.cells += 1
        for key, stage in closure(cell.record).items():
            if not open_.pop(key, None):
                continue
            if stage.name == "evaluate":
                found.models += 1
                found.evaluation += seconds(stage)
            elif stage.name in SHARED:
                found.text += seconds(stage)
            else:
                curve.seconds += seconds(stage)
    return found


def _teachers(cell: Cell) -> Iterator[tuple[str, str, Stage]]:
    """The stages that a teacher needs to be pruned and to teach, with its rung and what they are for."""
    yield from _trained(cell.rung, cell.teacher)
    if cell.config.prune.cuts:
        yield from _trained(cell.origin, cell.scores.inputs["teacher"])
        yield cell.origin, "scoring", cell.scores
    if signal := cell.distilled.inputs.get("signal"):
        yield cell.rung, "signal", signal


def _trained(rung: str, model: Stage) -> Iterator[tuple[str, str, Stage]]:
    for stage in closure(model).values():
        if stage.name in TEACHER:
            yield rung, "training", stage


def timetable(cells: Sequence[Cell], left: Mapping[str, Stage], seconds: Seconds, workers: int) -> tuple[float, int]:
    """Seconds on the clock, and the most jobs at once: wave after wave, the longest job first, as the grid does it."""
    gone: set[str] = set()
    total, most = 0.0, 0
    for wave in in_waves(cells):
        targets = {stage.key: stage for wanted in wave for stage in wanted if stage.key in left}
        jobs = []
        for target in targets.values():
            own = {k: s for k, s in closure(target).items() if k in left and k not in gone}
            gone |= own.keys()
            jobs.append(sum(map(seconds, own.values())))
        total += makespan(jobs, workers)
        most = max(most, min(workers, len(jobs)))
    return total, most


def makespan(jobs: Iterable[float], workers: int) -> float:
    """When the last of `jobs` (seconds each) ends, longest first on `workers`."""
    busy = [0.0] * max(1, workers)
    for seconds in sorted(jobs, reverse=True):
        heapq.heappush(busy, heapq.heappop(busy) + seconds)
    return max(busy)


def written(cells: Sequence[Cell], left: Mapping[str, Stage]) -> Iterator[float]:
    """Bytes of every model and every cached signal that is still to be written."""
    shapes = {key: c.student_shape for c in cells if c.config.train.trunk for key in closure(c.record)}
    for key, stage in left.items():
        if stage.name in ("teacher", "student"):
            yield stored_bytes(stage.config["shape"])
        if stage.name == "trunk":  # weights and two moments of AdamW
            yield 3 * stored_bytes(shapes[key])
    for cell in {c.teacher.key: c for c in cells if c.adapted}.values():
        if cell.teacher.key in left:
            yield stored_bytes(cell.teacher_shape)
    for cell in {c.distilled.key: c for c in cells}.values():
        if cell.distilled.key in left and cell.data_tokens:
            yield stored_bytes(cell.student_shape)
    for key, (stage, each) in signals(cells).items():
        if key in left:
            yield stage.config["tokens"] * each


def signals(cells: Iterable[Cell]) -> dict[str, tuple[Stage, float]]:
    """The cached signals that cells read, each with its bytes a token."""
    found = {}
    for cell in cells:
        if stage := cell.distilled.inputs.get("signal"):
            given: Mapping[str, Any] = stage.config
            each = signal_bytes_per_token(given["kind"], given["size"], dims(cell.teacher_shape).vocab)
            found[stage.key] = (stage, each)
    return found
