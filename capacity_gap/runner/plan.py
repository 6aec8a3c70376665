"""What a grid would take, before it is paid for: time, memory, disk, and what sharing saves. Imports no torch.

A stage takes `flops · a + passes · b` seconds: arithmetic, and what moving every token through the layers costs
however small the model. Both are fitted to what finished stages of this store took, so one calibration cell is enough.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.cell.pipeline import Cell, in_waves
from capacity_gap.models.accounting import peak_memory, signal_bytes_per_token, stored_bytes
from capacity_gap.models.axes import count_params, dims
from capacity_gap.models.defaults import training_only
from capacity_gap.runtime.process import gpus
from capacity_gap.settings.errors import ConfigError, Damaged
from capacity_gap.settings.scales import format_scale
from capacity_gap.store.files import NUMBER, read_all, read_json, stage_files
from capacity_gap.store.stage import Stage, Store, closure

CPU_FLOPS = 1.3e10  # of one thread, sustained on fp32 matrices of pico size: measured, two-core AVX2 machine
GPU_FLOPS = 1.2e14  # of one device: an A100's 312 TFLOP/s in bf16 at 40 % utilisation
CPU_SECONDS_PER_PASS = 2e-5  # measured with CPU_FLOPS
TIMED = {"name": str, "cost_flops": NUMBER, "wall_s": NUMBER, "created": str, "device": str}  # of a finished stage


@dataclass(frozen=True)
class Speed:
    """How fast one worker is, and how that is known."""

    seconds_per_flop: float
    seconds_per_pass: float
    source: str
    fixed: dict[str, float]  # mean seconds of stages without FLOPs (corpus, tokens, …), by name

    def seconds(self, stage: Stage) -> float:
        """What one worker needs for this stage alone."""
        if not stage.cost:
            return self.fixed.get(stage.name, 0.0)
        return stage.cost * self.seconds_per_flop + stage.passes * self.seconds_per_pass


def speed(store: Store, *, throughput: float | None, on_gpu: bool, devices: int = 1) -> Speed:
    """The speed of one worker as given (FLOP/s), else as measured in this store, else as assumed."""
    made = [meta for _, meta in read_all(store.root, stage_files(store.root), TIMED, check=_check_passes)]
    fixed = _fixed(made)
    if throughput:
        return Speed(1 / throughput, 0.0, f"given: {throughput:.3g} FLOP/s a worker", fixed)
    # The wall time of a resumed stage is that of its last part only.
    timed = [m for m in made if m["cost_flops"] > 0 and m.get("passes", 0) > 0 and not m.get("resumed", False)]
    if timed:
        # A store may have moved between machines: the device of the latest stage counts.
        device = max(timed, key=lambda m: m["created"])["device"]
        timed = [m for m in timed if m["device"] == device]
        a, b = _fit(timed)
        return Speed(a, b, f"measured: {len(timed)} finished stages of this store on {device}", fixed)
    if on_gpu:
        return Speed(1 / (GPU_FLOPS * devices), 0.0, f"assumed: {GPU_FLOPS:.3g} FLOP/s a GPU (say throughput=)", fixed)
    said = f"assumed: {CPU_FLOPS:.3g} FLOP/s a CPU thread; one finished cell calibrates it"
    return Speed(1 / CPU_FLOPS, CPU_SECONDS_PER_PASS, said, fixed)


def _check_passes(file: Path, meta: Mapping[str, Any]) -> None:
    if not isinstance(meta.get("passes", 0), NUMBER):
        raise TypeError(f"passes: {meta['passes']!r}")


def _fixed(made: Iterable[dict[str, Any]]) -> dict[str, float]:
    walls: dict[str, list[float]] = {}
    for meta in made:
        if not meta["cost_flops"]:
            walls.setdefault(meta["name"], []).append(meta["wall_s"])
    return {name: sum(w) / len(w) for name, w in walls.items()}


def _fit(timed: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Non-negative least squares of wall = flops·a + passes·b, each stage weighted by the root of what it took.

    Between absolute errors (long stages decide what a grid costs) and relative ones (short stages are many).
    """
    import numpy as np
    from scipy.optimize import nnls

    wall = np.array([max(m["wall_s"], 1e-3) for m in timed])
    terms = np.array([[m["cost_flops"], m["passes"]] for m in timed], dtype=float)
    # FLOPs are larger than passes by orders of magnitude: unscaled, the system would be ill-conditioned.
    scale = terms.max(axis=0)
    found, _ = nnls(terms / scale / np.sqrt(wall)[:, None], np.sqrt(wall))
    return tuple(found / scale)


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
    wall_s: float  # with `workers` of them at once
    workers: int
    memory: dict[str, float]  # of one device, at the stages that need most, bytes
    disk_bytes: float  # of what is still to be written
    signals: tuple[str, ...]  # kinds of cached signals, with their bytes a token
    speed: Speed
    models: list[str]  # what is trained, in words
    texts: list[str]  # whether the training texts are long enough, in words
    devices: int  # of one worker

    @property
    def memory_bytes(self) -> float:
        """Of one device, at its largest stage."""
        return max(self.memory.values())

    @property
    def device_hours(self) -> float:
        """All workers and all their devices together."""
        return self.worker_s * self.devices / 3600

    @property
    def lines(self) -> list[str]:
        """The plan as text."""
        rows = [f"{'stage':<12}{'distinct':>9}{'there':>7}{'to run':>8}{'FLOPs':>10}{'time':>10}"]
        rows += [
            f"{name:<12}{n:>9}{n - left:>7}{left:>8}{flops:>10.3g}{format_seconds(seconds):>10}"
            for name, n, left, flops, seconds in self.kinds
        ]
        share = self.flops_shared / max(1.0, self.flops_alone)
        return [
            f"plan: {self.cells} cells, {self.done} of them recorded; nothing is started",
            *self.models,
            *self.texts,
            *rows,
            f"to run: {self.flops:.3g} FLOPs, {format_seconds(self.worker_s)} of one worker, about "
            f"{format_seconds(self.wall_s)} with {self.workers} at once",
            f"speed {self.speed.source}",
            f"tensors up to {format_bytes(self.memory_bytes)} a {'device' if self.devices > 1 else 'worker'}"
            f" ({', '.join(f'{name} {format_bytes(size)}' for name, size in self.memory.items())}), "
            f"disk {format_bytes(self.disk_bytes)}",
            *([f"cached signals, bytes a token: {', '.join(self.signals)}"] if self.signals else []),
            *([f"{self.devices} devices a worker: {self.device_hours:,.0f} device-hours"] if self.devices > 1 else []),
            f"every cell alone would take {self.flops_alone:.3g} FLOPs, shared {self.flops_shared:.3g} ({share:.0%})",
        ]


def make_plan(cells: Sequence[Cell], store: Store, *, workers: int = 1) -> Plan:
    """Adds up what is not in the store yet; computes nothing."""
    first = cells[0].config
    on_gpu = first.train.device.startswith("cuda") or (first.train.device == "auto" and gpus() > 0)
    pace = speed(store, throughput=first.throughput, on_gpu=on_gpu, devices=first.devices)
    stages: dict[str, Stage] = {}
    for cell in cells:
        stages.update(closure(cell.record))
    left = {key: s for key, s in stages.items() if not store.has(s)}
    kinds = []
    for name in dict.fromkeys(s.name for s in stages.values()):
        mine = [s for s in left.values() if s.name == name]
        total = sum(s.name == name for s in stages.values())
        kinds.append((name, total, len(mine), sum(s.cost for s in mine), sum(map(pace.seconds, mine))))
    return Plan(
        cells=len(cells),
        done=sum(store.has(c.record) for c in cells),
        kinds=kinds,
        flops=sum(s.cost for s in left.values()),
        flops_shared=sum(s.cost for s in stages.values()),
        flops_alone=sum(s.cost for c in cells for s in closure(c.record).values()),
        worker_s=sum(map(pace.seconds, left.values())),
        wall_s=_wall(cells, left, pace, workers),
        workers=workers,
        memory=_largest(_memory(c) for c in cells),
        disk_bytes=sum(_written(cells, left)),
        signals=tuple(sorted({f"{s.config['kind']}-{s.config['size']} {e:g}" for s, e in _signals(cells).values()})),
        speed=pace,
        models=_models(cells),
        texts=_texts(cells, store),
        devices=first.devices,
    )


def noted_cell(cell: Cell, overrides: Sequence[str], pace: Speed) -> dict[str, Any]:
    """What a store notes of a planned cell: its name, its overrides, and its stages with their seconds."""
    stages = {key: round(pace.seconds(stage), 3) for key, stage in closure(cell.record).items()}
    return {"name": cell.name, "overrides": list(overrides), "stages": stages}


def _models(cells: Sequence[Cell]) -> list[str]:
    """Every student and teacher once: its shape and its exact size."""
    found: dict[str, None] = {}
    for kind, name, shape in (
        *(("student", format_scale(c.student_scale), c.student_shape) for c in cells),
        *(("teacher", c.rung, c.teacher_shape) for c in cells),
    ):
        sizes = dims(shape)
        said = f"{sizes.layers}x{sizes.hidden}x{sizes.heads}x{sizes.neurons}, vocabulary {sizes.vocab:,}"
        found[f"{kind} {name}: {count_params(shape):,} parameters, {said}"] = None
    for c in cells:
        if keys := training_only(c.teacher_shape):
            found[f"teacher {c.rung}: {', '.join(keys)} of its config.json is ignored in training"] = None
    return list(found)


def _texts(cells: Sequence[Cell], store: Store) -> list[str]:
    """For each training text: what one pass must hold, and what it does hold if it is packed already."""
    most: dict[tuple[str, int], tuple[int, str, Stage]] = {}
    for cell in cells:
        length = cell.config.corpus.sequence_length
        for stage, tokens, epochs, setting in cell.budgets:
            each = tokens // (length * epochs) * length  # whole sequences
            if each > most.get((stage.key, length), (-1,))[0]:
                most[stage.key, length] = each, setting, stage
    found = []
    for (_, length), (tokens, setting, stage) in most.items():
        said = f"text: {setting} wants {tokens:,} tokens a pass"
        if not store.has(stage):
            found.append(f"{said}; what the corpus holds is known once it is packed, before any model is trained")
            continue
        try:
            packed = read_json(store.path(stage) / "train.json", {"tokens": int})["tokens"]
        except Damaged as error:
            found.append(f"{said}; {error.file} {error.why}, so the corpus will be packed again")
            continue
        held = (packed - 1) // length * length
        found.append(f"{said}, the corpus holds {held:,}" + (": TOO FEW, those cells will fail" * (tokens > held)))
    return found


def _written(cells: Sequence[Cell], left: Mapping[str, Stage]) -> Iterator[float]:
    """Bytes of every model that is still to be written."""
    for stage in left.values():
        if stage.name in ("teacher", "student"):
            yield stored_bytes(stage.config["shape"])
    for cell in {c.teacher.key: c for c in cells if c.adapted}.values():
        if cell.teacher.key in left:
            yield stored_bytes(cell.teacher_shape)
    for cell in {c.distilled.key: c for c in cells}.values():
        if cell.distilled.key in left and cell.data_tokens:
            yield stored_bytes(cell.student_shape)
    for key, (stage, each) in _signals(cells).items():
        if key in left:
            yield stage.config["tokens"] * each


def _signals(cells: Sequence[Cell]) -> dict[str, tuple[Stage, float]]:
    """The cached signals that cells read, each with its bytes a token."""
    found = {}
    for cell in cells:
        if stage := cell.distilled.inputs.get("signal"):
            given = stage.config
            each = signal_bytes_per_token(given["kind"], given["size"], dims(cell.teacher_shape).vocab)
            found[stage.key] = (stage, each)
    return found


def _wall(cells: Sequence[Cell], left: dict[str, Stage], pace: Speed, workers: int) -> float:
    """Wave after wave, the longest job first onto whichever worker is free: as the grid does it."""
    gone: set[str] = set()
    total = 0.0
    for wave in in_waves(cells):
        targets = [stage for wanted in wave for stage in wanted]
        jobs = []
        for target in {s.key: s for s in targets}.values():
            own = {k: s for k, s in closure(target).items() if k in left and k not in gone}
            gone |= own.keys()
            jobs.append(sum(map(pace.seconds, own.values())))
        total += makespan(jobs, workers)
    return total


def makespan(jobs: Iterable[float], workers: int) -> float:
    """When the last of `jobs` (seconds each) ends, longest first on `workers`."""
    busy = [0.0] * max(1, workers)
    for seconds in sorted(jobs, reverse=True):
        heapq.heappush(busy, heapq.heappop(busy) + seconds)
    return max(busy)


def _memory(cell: Cell) -> dict[str, float]:
    """Bytes of one device while each kind of stage that holds much is at work."""
    c = cell.config
    teacher = stored_bytes(cell.teacher_shape, dtype=_dtype(cell), quantization=c.family.quantization)
    found = {"distil": _training(cell, cell.student_shape, c.train.batch_size)}
    share = teacher / (1 if cell.placement == "one" else c.devices)  # one layer more, whole, is left out
    if cell.teacher_flops:
        found["distil"] += share
    if c.prune.init != "random":
        found["scores"] = 2 * share  # its weights and their gradients
    if cell.adapt_tokens:
        found["adapt"] = _training(cell, cell.teacher_shape, c.adapt.optim.batch_size)
    if cell.teacher_tokens is not None:
        found["teacher"] = _training(cell, cell.teacher_shape, c.family.pretrain.batch_size)
    return found


def _dtype(cell: Cell) -> str:
    """Published checkpoints are held as the family says, what was trained here in fp32."""
    return "fp32" if cell.adapted or cell.teacher_tokens is not None else cell.config.family.dtype


def _training(cell: Cell, shape: Mapping[str, Any], batch: int) -> float:
    c = cell.config.train
    share = -(-batch // cell.config.devices)
    return peak_memory(
        shape,
        tokens=min(c.micro_batch_size or share, share) * cell.config.corpus.sequence_length,
        precision=c.precision,
        shards=cell.config.devices if c.sharding == "fsdp" else 1,
        checkpointing=c.activation_checkpointing,
    )


def _largest(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The most that any of the cells needs, kind by kind."""
    most: dict[str, float] = {}
    for one in found:
        most |= {name: max(size, most.get(name, 0.0)) for name, size in one.items()}
    return most


def check_budget(plan: Plan, hours: float | None) -> None:
    """Raises if the grid costs more worker-hours than `budget_hours` allows."""
    if hours is not None and plan.worker_s > 3600 * hours:
        raise ConfigError(
            f"budget_hours={hours:g}, but this grid needs about {plan.worker_s / 3600:.3g} worker-hours (speed "
            f"{plan.speed.source}). Nothing was started. Raise budget_hours, or run fewer cells: `plan=true` says what "
            "each kind of stage takes."
        )


def format_seconds(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Bytes as people say them: `12 MB`, `3.4 GB`."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
