"""The cost of a grid before it runs: time, devices, memory, disk, and what sharing saves. No torch.

`speed.py` estimates a worker's speed, `cost.py` breaks down the time, `plan_memory.py` checks what fits a device, and
`plan_texts.py` whether the texts are long enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capacity_gap.cell.pipeline import Cell
from capacity_gap.cell.recipes import recipe_line, recipe_of
from capacity_gap.models.accounting import Memory
from capacity_gap.runner.cost import costs, signals, timetable, written
from capacity_gap.runner.machines import Machines, Worker, worker_of
from capacity_gap.runner.plan_lines import (
    clock_words,
    evaluation_line,
    format_bytes,
    format_hours,
    format_seconds,
    memory_lines,
    stages_line,
    student_lines,
    teacher_lines,
    warnings,
)
from capacity_gap.runner.plan_memory import Need, held_in, needs
from capacity_gap.runner.plan_texts import text_lines
from capacity_gap.runner.speed import Speed, speed
from capacity_gap.runtime.process import has_bf16
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import counted, format_scale
from capacity_gap.store.stage import Stage, Store, closure

MUCH_FOR_A_CPU = 100  # device-hours from which a plan for a CPU says how to plan for a GPU


@dataclass(frozen=True)
class Plan:
    """What a grid would compute, and what that takes."""

    cells: int
    done: int
    kinds: list[tuple[str, int, int, float, float]]  # stage, distinct, to run, FLOPs and seconds of those to run
    flops: float
    flops_shared: float  # of all stages, finished ones included
    flops_alone: float  # if every cell computed its whole chain
    worker_s: float  # of all workers together
    wall_s: float  # with `at_once` of them
    at_once: int  # the most jobs that run together in any wave
    cards: int | None  # GPUs of all jobs together where they may share them, 0 if unknown; else None
    queued_s: float  # as `wall_s`, if all jobs share one GPU, where that is not known
    needs: dict[str, Need]  # memory by kind of stage
    disk_bytes: float  # of what is still to be written
    signals: tuple[str, ...]  # kinds of cached signals, with their bytes a token
    speed: Speed
    worker: Worker
    models: list[str]  # what is trained and what it costs, in words
    texts: list[str]  # whether the training texts are long enough, in words
    warnings: list[str]  # what the grid cannot find, in words

    @property
    def memory(self) -> dict[str, Memory]:
        """Of one device, by kind of stage."""
        return {name: need.memory for name, need in self.needs.items()}

    @property
    def memory_bytes(self) -> float:
        """Of one device, at its largest stage."""
        return max((memory.total for memory in self.memory.values()), default=0.0)

    @property
    def device_hours(self) -> float:
        """Hours of all devices of all workers together."""
        return self.worker_s * self.worker.devices / 3600

    @property
    def reckoning(self) -> str:
        """How the device-hours come about."""
        hours = format_hours(self.worker_s / 3600)
        return f"{hours} hours of one worker x {self.worker.devices:g} devices; speed {self.speed.source}"

    @property
    def too_short(self) -> list[str]:
        """The texts that are too short, in words."""
        return [text for text in self.texts if text.startswith("warning")]

    @property
    def lines(self) -> list[str]:
        """The plan as text."""
        share = self.flops_shared / max(1.0, self.flops_alone)
        each = f"{self.worker.devices:.3g} device{'s' * (self.worker.devices > 1)} a worker"
        alone = [
            f"every cell alone would take {self.flops_alone:.3g} FLOPs, shared {self.flops_shared:.3g} ({share:.0%})"
        ] * (share < 0.995)
        slow = not self.worker.gpu and self.device_hours > MUCH_FOR_A_CPU
        hint = "; device_name=h100 plans for such a GPU, with -m also hydra/launcher=slurm" if slow else ""
        cached = f"; cached signals, bytes a token: {', '.join(self.signals)}" if self.signals else ""
        return [
            f"plan: {counted(self.cells, 'cell')}, {self.done} of them recorded; nothing is started",
            *self.models,
            *self.texts,
            *self.warnings,
            stages_line(self.kinds),
            f"to run: {self.flops:.3g} FLOPs, {format_seconds(self.worker_s)} of one worker, "
            f"{clock_words(self.wall_s, self.at_once, self.cards, self.queued_s)}; "
            f"{format_hours(self.device_hours)} device-hours ({each})",
            f"speed {self.speed.source}{hint}",
            *memory_lines(self.needs, self.worker),
            f"disk {format_bytes(self.disk_bytes)} of models and signals; texts, downloads and checkpoints in training "
            f"come on top{cached}",
            *alone,
        ]


def make_plan(cells: Sequence[Cell], store: Store, *, machines: Machines | None = None) -> Plan:
    """Adds up what is not in the store yet; computes nothing. `machines`: what the launcher gives, else this one.

    Raises:
        ConfigError: a setting names a device that is not known.
    """
    first, given = cells[0].config, machines or Machines()
    stages: dict[str, Stage] = {}
    for cell in cells:
        stages.update(closure(cell.record))
    shared = {s.name for s in stages.values() if s.collective}
    worker = worker_of(first, given)
    pace, worker = speed(store, worker, throughput=first.throughput, collective=shared)
    left = {key: s for key, s in stages.items() if not store.has(s)}
    kinds = []
    for name in dict.fromkeys(s.name for s in stages.values()):
        mine = [s for s in left.values() if s.name == name]
        total = sum(s.name == name for s in stages.values())
        kinds.append((name, total, len(mine), sum(s.cost for s in mine), sum(map(pace.seconds, mine))))
    spent = costs(cells, left, pace.seconds)
    wall_s, at_once = timetable(cells, left, pace.seconds, given.at_once)
    cards = given.cards(worker) if at_once > 1 else None
    if cards:  # in turns; an assumed speed is that of a share
        part = worker.share if pace.assumed else 1.0
        wall_s, _ = timetable(cells, left, lambda s: part * pace.seconds(s), max(1, cards // worker.ranks))
    return Plan(
        cells=len(cells),
        done=sum(store.has(c.record) for c in cells),
        kinds=kinds,
        flops=sum(s.cost for s in left.values()),
        flops_shared=sum(s.cost for s in stages.values()),
        flops_alone=sum(s.cost for c in cells for s in closure(c.record).values()),
        worker_s=sum(map(pace.seconds, left.values())),
        wall_s=wall_s,
        at_once=at_once,
        cards=cards,
        queued_s=timetable(cells, left, pace.seconds, 1)[0] if cards == 0 else wall_s,
        needs=needs(cells, devices=worker.ranks),
        disk_bytes=sum(written(cells, left)),
        signals=tuple(sorted({f"{s.config['kind']}-{s.config['size']} {e:g}" for s, e in signals(cells).values()})),
        speed=pace,
        worker=worker,
        models=[
            *teacher_lines(cells, spent),
            *student_lines(cells, spent),
            *_recipe_lines(cells),
            evaluation_line(cells, spent),
        ],
        texts=text_lines(cells, store),
        warnings=[*warnings(cells), *recipe_warnings(cells), *_slow_bf16(cells, worker, pace)],
    )


def noted_cell(cell: Cell, overrides: Sequence[str], pace: Speed) -> dict[str, Any]:
    """What a store notes of a planned cell: its name, its overrides, and its stages with their seconds."""
    stages = {key: round(pace.seconds(stage), 3) for key, stage in closure(cell.record).items()}
    return {"name": cell.name, "overrides": list(overrides), "stages": stages}


def _recipe_lines(cells: Sequence[Cell]) -> list[str]:
    """A line for each recipe; where budgets are trained in other steps, which budgets it is for."""
    budgets: dict[str, dict[int, None]] = {}
    for c in cells:
        line = recipe_line(c.config, c.student_target, None if c.start_shape else c.multiple)
        budgets.setdefault(line, {})[c.data_tokens] = None
    if len({tuple(mine) for mine in budgets.values()}) < 2:
        return list(budgets)
    return [f"data={','.join(map(format_scale, mine))}: {line}" for line, mine in budgets.items()]


def _slow_bf16(cells: Sequence[Cell], worker: Worker, pace: Speed) -> list[str]:
    """What runs in bf16 on a CPU that has no units for it."""
    keys = {
        "train.precision": any(c.precision == "bf16" and c.data_tokens for c in cells),
        "family.dtype": any(held_in(c) == "bf16" for c in cells),
    }
    if worker.gpu or has_bf16() is not False or not any(keys.values()):
        return []
    times = "; the times here are those of fp32" if pace.assumed else ""
    return [
        "warning: bf16 on a CPU without bf16 units takes about seven times as long as fp32: set "
        f"{' '.join(f'{key}=fp32' for key, used in keys.items() if used)}{times}"
    ]


def recipe_warnings(cells: Sequence[Cell]) -> list[str]:
    """A grid whose students or budgets are trained by different recipes compares more than their sizes."""
    names = list(dict.fromkeys(recipe_of(c.config, c.student_target).name for c in cells))
    found = []
    if len(names) > 1:
        found += [
            f"warning: students of two recipes ({', '.join(names)}): train.recipe={names[-1]} gives all of them one"
        ]
    steps: dict[int, set[int]] = {}
    for c in cells:
        if c.data_tokens:
            steps.setdefault(c.student_scale, set()).add(c.batch_size)
    if any(len(sizes) > 1 for sizes in steps.values()):
        sizes = sorted(set().union(*steps.values()))
        found += [
            f"warning: budgets of one student are trained in steps of {' and '.join(map(str, sizes))} sequences, so "
            f"budgets differ in more than tokens: train.batch_size={sizes[0]} gives all of them one"
        ]
    return found


def check_budget(plan: Plan, hours: float | None) -> None:
    """Raises if the grid costs more device-hours than `budget_hours` allows."""
    if hours is not None and plan.device_hours > hours:
        raise ConfigError(
            f"budget_hours={hours:g}, but this needs about {format_hours(plan.device_hours)} device-hours "
            f"({plan.reckoning}). Nothing was started. Raise budget_hours, or give fewer tokens or a smaller teacher."
        )
