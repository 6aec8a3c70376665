"""What each kind of work holds in one device's memory, by parts, and how many devices it takes. Imports no torch."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from capacity_gap.cell.pipeline import Cell
from capacity_gap.models.accounting import Memory, activation_bytes, stored_bytes, training_memory

ROOM = 0.9  # of a device's memory: the rest goes to CUDA itself, buffers and fragments
MOST_DEVICES = 1024


SPREAD = "family.placement=ranks or devices spreads the teacher over several devices"


@dataclass(frozen=True)
class Training:
    """One training run, as far as memory is concerned."""

    shape: Mapping[str, Any]
    batch: int  # sequences of one step, over all devices
    micro: int | None
    length: int
    precision: str
    devices: int
    sharded: bool
    checkpointing: bool
    teacher: float  # bytes of one that runs beside

    @property
    def at_once(self) -> int:
        """Sequences that one device has at once."""
        share = -(-self.batch // self.devices)
        return min(self.micro or share, share)

    @property
    def memory(self) -> Memory:
        """Of one device."""
        found = training_memory(
            self.shape,
            tokens=self.at_once * self.length,
            precision=self.precision,
            shards=self.devices if self.sharded else 1,
            checkpointing=self.checkpointing,
        )
        return replace(found, teacher=self.teacher)

    @property
    def peak(self) -> float:
        """Bytes of one device at the worst moment: before it is sharded, the whole model is on each."""
        return max(self.memory.total, stored_bytes(self.shape) + self.teacher)

    def smaller(self) -> Iterator["Training"]:
        """The same run with ever less memory: smaller micro-batches, checkpointing, then shards on ever more devices.

        None of these changes the result.
        """
        devices = self.devices
        while devices <= MOST_DEVICES:
            for sharded in sorted({self.sharded, devices > 1}):
                for kept in sorted({self.checkpointing, True}):
                    given = replace(self, devices=devices, sharded=sharded, checkpointing=kept)
                    micro = given.at_once
                    while micro:
                        yield replace(given, micro=micro)
                        micro //= 2
            devices *= 2

    def changes_to(self, other: "Training") -> str:
        """What must be set for `other`, in words."""
        said = []
        if other.sharded and not self.sharded:
            said.append("train.sharding=fsdp")
        if other.checkpointing and not self.checkpointing:
            said.append("train.activation_checkpointing=true")
        if other.at_once < replace(other, micro=self.micro).at_once:
            said.append(f"train.micro_batch_size={other.at_once}")
        return " ".join(said)


@dataclass(frozen=True)
class Need:
    """What one kind of work holds in one device's memory."""

    memory: Memory
    training: Training | None = None  # None: scores and signals, which are made on one device
    sequences: int = 0  # that activations are of, where `training` does not say it

    def advice(self, capacity: float) -> str:
        """Whether it fits a device of so many bytes, and if not what would make it fit."""
        room, size = ROOM * capacity, f"{capacity / 1e9:.3g} GB"
        if (self.training.peak if self.training else self.memory.total) <= room:
            return f"fits one {size} device"
        if self.training:
            for other in self.training.smaller():
                if other.peak <= room:
                    changes = self.training.changes_to(other)
                    if other.sharded:
                        return f"needs {other.devices} devices of {size}: {changes or 'raise gpus'}"
                    return f"fits one {size} device with {changes}"
            if room / 2 < self.memory.teacher <= room:
                return f"TOO LARGE FOR {size}: the whole teacher is on each device: {SPREAD}"
            return f"TOO LARGE FOR {size}: models are loaded whole on each device before sharding"
        each, fixed = self.memory.activations / max(1, self.sequences), self.memory.total - self.memory.activations
        if self.sequences and fixed + each <= room:
            most = int((room - fixed) / each)
            return f"TOO LARGE FOR {size}: a device can hold prune.batch_size={most}"
        return f"TOO LARGE FOR {size}: {SPREAD}"


def needs(cells: Iterable[Cell], *, devices: int) -> dict[str, Need]:
    """The most that any of the cells needs of one device, by kind of stage."""
    most: dict[str, Need] = {}
    for cell in cells:
        for name, need in _of_cell(cell, devices).items():
            if name not in most or need.memory.total > most[name].memory.total:
                most[name] = need
    return most


def _of_cell(cell: Cell, devices: int) -> dict[str, Need]:
    c, teacher, origin = cell.config, cell.teacher_shape, cell.family.rungs[cell.origin]
    held = {"dtype": held_in(cell), "quantization": c.family.quantization}
    share = 1 if cell.placement == "one" else devices  # one layer more, which is whole for a moment, is left out
    weights = stored_bytes(teacher, **held) / share
    beside = weights if "teacher" in cell.distilled.inputs and cell.teacher_flops else 0.0
    found: dict[str, Need] = {}
    if cell.data_tokens:
        found["distil"] = _training(cell, cell.student_shape, cell.batch_size, devices, beside)
    if c.prune.cuts:
        tokens, whole = cell.score_batch * cell.sequence_length, stored_bytes(origin, **held) / share
        kept = activation_bytes(origin, tokens=tokens, precision=held_in(cell))
        found["scores"] = Need(Memory(whole, whole, activations=kept), sequences=cell.score_batch)
    if "signal" in cell.distilled.inputs:
        found["signal"] = Need(Memory(weights))
    if cell.adapt_tokens:
        found["adapt"] = _training(cell, teacher, c.adapt.optim.batch_size, devices)
    if cell.teacher_tokens is not None:
        found["teacher"] = _training(cell, teacher, c.family.pretrain.batch_size, devices)
    return found


def _training(cell: Cell, shape: Mapping[str, Any], batch: int, devices: int, teacher: float = 0.0) -> Need:
    c = cell.config.train
    run = Training(
        shape=shape,
        batch=batch,
        micro=c.micro_batch_size,
        length=cell.sequence_length,
        precision=cell.precision,
        devices=devices,
        sharded=c.sharding == "fsdp" and devices > 1,
        checkpointing=c.activation_checkpointing,
        teacher=teacher,
    )
    return Need(run.memory, run)


def held_in(cell: Cell) -> str:
    """Published checkpoints are held as the family says, what was trained here in fp32."""
    return "fp32" if cell.adapted or cell.teacher_tokens is not None else cell.teacher_dtype
