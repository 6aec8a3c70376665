"""The one training loop: pre-training is distillation without a teacher.

Everything a step does is a function of the step's number: which sequences it sees, its learning rate, its place in the
accumulation. So a run that was interrupted goes on from a checkpoint to the same weights, bit for bit.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.distill.hidden import HiddenMatch
from capacity_gap.distill.losses import distill_loss
from capacity_gap.distill.signals import Signal
from capacity_gap.distill.sparse import SparseTargets
from capacity_gap.models.loading import hidden_states, output_weight, predicted
from capacity_gap.runtime.process import Interrupted, Runtime
from capacity_gap.settings.errors import StageError
from capacity_gap.store import checkpoint
from capacity_gap.structure.head import logit_cap
from capacity_gap.training.accelerator import make_accelerator
from capacity_gap.training.optimizer import learning_rate, make_optimizer
from capacity_gap.training.pace import Pace, forget_peak, peak_memory
from capacity_gap.training.train_config import OptimConfig
from capacity_gap.training.trunk import Branch

log = logging.getLogger(__name__)
LOG_EVERY = 10  # steps between points of the history
HELD_OUT = 20_480  # tokens of held-out text that a loss on the way is measured on: the same for every run


class Sequences(Protocol):
    """Packed text: `batch(indices)` gives tokens [n, T+1], of which the first T are inputs and the last T labels."""

    @property
    def sequence_length(self) -> int: ...  # noqa: D102

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """What one run does, step by step."""

    order: np.ndarray  # the sequences, in the order in which they are seen
    optim: OptimConfig
    distill: DistillConfig
    peak: float  # learning rate
    micro_batch: int  # sequences on one device at once
    evaluate_every: int = 0  # tokens between held-out losses on the way
    activation_checkpointing: bool = False
    compile: bool = False
    peak_flops: float | None = None  # of one device; None: by its name
    branch: Branch | None = None  # the rates of a trunk or a branch, in place of the schedule

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if self.branch is not None:
            return self.branch.rate(step, self.steps, peak=self.peak, final=self.optim.final)
        return learning_rate(step, self.steps, self.optim, self.peak)

    @property
    def steps(self) -> int:
        """Optimiser steps; the last one may hold fewer sequences."""
        return math.ceil(len(self.order) / self.optim.batch_size)

    def measures(self, step: int, length: int) -> bool:
        """Whether a held-out loss is due after this step: it passed a multiple of `evaluate_every`, or is the last."""
        if not self.evaluate_every:
            return False
        before, after = (min(s * self.optim.batch_size, len(self.order)) * length for s in (step, step + 1))
        return after // self.evaluate_every > before // self.evaluate_every or step + 1 == self.steps

    def sequences(self, step: int) -> np.ndarray:
        """The indices that make up one step, over all devices."""
        return self.order[step * self.optim.batch_size : (step + 1) * self.optim.batch_size]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves besides the weights. `history`: the logged points, each a flat dict."""

    steps: int
    tokens: int
    wall_s: float
    tokens_per_s: float
    mfu: float | None  # model FLOPs over the devices' peak, where that is known
    peak_memory_bytes: int
    micro_batch: int  # sequences on one device at once, after any halving
    history: list[dict]


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, over all ranks: their tokens [n, T+1] and their indices in the text [n]."""

    rows: np.ndarray
    sequences: np.ndarray
    predicted: int  # labels of a sequence that the model predicts, the last ones

    @property
    def label_count(self) -> float:
        """The labels of the whole step."""
        return float(len(self.rows) * self.predicted)

    def share(self, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """One rank's inputs [n, T] and labels [n, predicted], and the indices of its sequences [n].

        All ranks get equally many, so that they meet in every collective call: where the batch has too few, a sequence
        comes twice, the second time with no label that counts.
        """
        places = np.arange(rank, rank + -(-len(self.rows) // size) * size, size)
        inside = np.minimum(places, len(self.rows) - 1)
        mine = torch.from_numpy(self.rows[inside])
        labels = mine[:, -self.predicted :].clone()
        labels[torch.from_numpy(places >= len(self.rows))] = -100
        return mine[:, :-1], labels, torch.from_numpy(self.sequences[inside])


class Objective(nn.Module):
    """Student and loss in one module, so that a data-parallel wrapper sees every parameter in one forward pass."""

    def __init__(self, student: Any, distill: DistillConfig, teacher: Any = None) -> None:
        super().__init__()
        self.student = student
        self.distill = distill
        self.match: HiddenMatch | None = None
        if distill.hidden_weight > 0:
            self.match = HiddenMatch(output_weight(student).shape[1], output_weight(teacher).shape[1])

    @property
    def trained(self) -> nn.Module:
        """What a checkpoint holds: the student, and where hidden states are matched their projection."""
        return self.student if self.match is None else self

    def forward(
        self, tokens: Tensor, labels: Tensor, teacher: tuple | SparseTargets | None, count: float
    ) -> tuple[Tensor, dict]:
        """The loss of one micro-batch and its parts, divided by the label count of the whole step."""
        online = teacher if isinstance(teacher, tuple) else (None, None, None)
        hidden = hidden_states(self.student, tokens)
        loss, parts = distill_loss(
            hidden,
            output_weight(self.student),
            labels,
            teacher_hidden=online[0],
            teacher_weight=online[1],
            signal=teacher if isinstance(teacher, SparseTargets) else None,
            loss=self.distill.loss,
            # Held-out losses on the way are taken without a teacher.
            kd_weight=0.0 if teacher is None else self.distill.kd_weight,
            temperature=self.distill.temperature,
            tau_squared=self.distill.tau_squared,
            skew=self.distill.skew,
            label_count=count,
            student_cap=logit_cap(self.student.config),
            teacher_cap=online[2],
        )
        if self.match is not None and online[0] is not None:
            parts["hidden"] = self.match(hidden, online[0], labels) / count
            loss = loss + self.distill.hidden_weight * parts["hidden"]
        return loss, {name: value.detach() for name, value in parts.items()}


def train(
    student: Any,
    sequences: Sequences,
    plan: Plan,
    *,
    runtime: Runtime,
    checkpoints: Path,
    teacher: Any = None,
    held_out: Sequences | None = None,
    precision: str = "fp32",
    on_log: Callable[[dict], None] = lambda point: None,
    begin: Path | None = None,
    leave: Path | None = None,
) -> TrainResult:
    """Trains `student` in place on the sequences that `plan` orders.

    Args:
        student: a causal language model.
        sequences: the packed text that `plan.order` indexes.
        plan: order, optimiser, objective, learning rate.
        runtime: device, progress, interruption.
        checkpoints: folder for checkpoints; a run found there is continued.
        teacher: gives the soft targets: a model, or a cached `Signal`; needed if `plan.distill.kd_weight` > 0.
        held_out: text for the losses on the way, at multiples of `plan.evaluate_every` tokens and at the end.
        precision: `fp32`, or `bf16` autocast.
        on_log: called with each logged point; a run that goes on from a checkpoint begins with those before it.
        begin: another run's folder, whose end this run goes on from.
        leave: where this run's end is kept for others to go on from.

    Returns:
        The result; each point of its history has step, tokens, ce, (kd, kl, teacher_entropy, hidden,) learning_rate,
        grad_norm, and where it was measured held_out.

    Raises:
        StageError: the loss is no longer finite.
        Interrupted: the process was asked to stop; a checkpoint was written.
    """
    accelerator = make_accelerator(runtime, precision, student)
    forget_peak(runtime.device)
    # Nothing may act in training mode only. transformers checkpoints activations in that mode alone, so then, and only
    # then, the student is in it; what else would act was switched off when it was made (`models/quiet.py`).
    student.to(accelerator.device).train(plan.activation_checkpointing)
    if plan.compile:
        torch.compiler.reset()  # of a function torch keeps eight shapes in a process, and compiles no further one
    _trade_memory(student, plan, on=True)
    if isinstance(teacher, nn.Module):
        if not hasattr(teacher, "hf_device_map"):  # else its layers were put where they are
            teacher.to(accelerator.device)
        teacher.eval()
        _compile(teacher, plan.compile)
    _note_widths(student, teacher)
    bare = Objective(student, plan.distill, teacher).to(accelerator.device)
    optimizer = make_optimizer(bare, plan.optim)
    objective, prepared = accelerator.prepare(bare, optimizer)
    labels = predicted(student, sequences.sequence_length)
    # After `prepare`, which shards parameters under FSDP: a checkpoint holds whole tensors and is sharded as they are.
    start, history = checkpoint.load(checkpoints, bare.trained, optimizer)
    if begin is not None and start == 0:
        start, history = checkpoint.load(begin, bare.trained, optimizer)
        if start == 0:
            raise StageError(f"{begin} has no state to resume from: `store verify --repair` sets damaged stages aside.")
    for point in history:
        on_log(point)
    beside = teacher if isinstance(teacher, nn.Module) and plan.distill.kd_weight > 0 else None
    pace = Pace.of(student, beside, peak=plan.peak_flops, runtime=runtime, precision=precision)
    saved, micro = time.monotonic(), plan.micro_batch

    for step in range(start, plan.steps):
        rate = plan.rate(step)
        # A function of the step alone: a scheduler's state would have to be checkpointed too.
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = Batch(sequences.batch(plan.sequences(step)), plan.sequences(step), labels)
        parts, norm, micro = _fitting_step(accelerator, objective, prepared, teacher, batch, plan, micro)
        pace.tokens += len(batch.rows) * sequences.sequence_length
        last = step + 1 == plan.steps
        measured = held_out is not None and plan.measures(step, sequences.sequence_length)
        if step % LOG_EVERY == 0 or last or measured:
            point = _point(accelerator, parts, norm, step, rate, plan, sequences.sequence_length)
            if held_out is not None and measured:
                point["held_out"] = pace.apart(_held_out, accelerator, objective, held_out, micro, labels)
            history.append(point)
            on_log({**point, **pace.now})
        runtime.report(step + 1, plan.steps, "steps")
        due = time.monotonic() - saved > 60 * runtime.checkpoint_minutes
        # All ranks gather a checkpoint together, so the clock or the signal of one decides for all.
        if not last and runtime.ranks.any(due or runtime.stop.is_set()):
            checkpoint.save(checkpoints, step + 1, bare.trained, optimizer, history, leads=runtime.ranks.leads)
            saved = time.monotonic()
            if runtime.ranks.any(runtime.stop.is_set()):
                raise Interrupted
    if leave is not None:
        checkpoint.save(leave, plan.steps, bare.trained, optimizer, history, leads=runtime.ranks.leads)
    _trade_memory(student.eval(), plan, on=False)
    now, peak = pace.now, peak_memory(runtime.device)
    return TrainResult(plan.steps, pace.tokens, pace.seconds, now["tokens_per_s"], now.get("mfu"), peak, micro, history)


def _note_widths(student: Any, teacher: Any) -> None:
    """Says so where the output matrices have two heights: the rows that only one has take no part in KD."""
    if isinstance(teacher, nn.Module):
        ours, theirs = (len(output_weight(m)) for m in (student, teacher))
        if ours != theirs:
            log.warning(
                "the student's vocabulary is padded to %d rows, the teacher's to %d: KD uses the first %d",
                *(ours, theirs, min(ours, theirs)),
            )


def _trade_memory(student: Any, plan: Plan, *, on: bool) -> None:
    """Switches on (and after the run off) what changes how a student computes."""
    if plan.activation_checkpointing:
        old = not hasattr(student, "activation_checkpointing_enable")  # older transformers
        switch = f"{'gradient' if old else 'activation'}_checkpointing_{'enable' if on else 'disable'}"
        getattr(student, switch)(*([{"use_reentrant": False}] if on else []))
    _compile(student, plan.compile and on)


def _compile(model: Any, on: bool) -> None:
    """Compiles the layers in place, so that parameters keep their names."""
    if on:
        model.base_model.compile()
    else:
        # What `Module.compile` sets; torch has no call that undoes it.
        model.base_model._compiled_call_impl = None


@torch.no_grad()
def _held_out(accelerator: Any, objective: Any, text: Sequences, micro: int, labels: int) -> float:
    """Label cross-entropy on the first sequences of a held-out text; every rank computes all of it."""
    rows = text.batch(np.arange(min(len(text), max(1, HELD_OUT // text.sequence_length))))
    total = 0.0
    for part in torch.from_numpy(rows).split(micro):
        tokens = part.to(accelerator.device)
        with accelerator.autocast():
            _, parts = objective(tokens[:, :-1], tokens[:, -labels:], None, float(len(rows) * labels))
        total += float(parts["ce"])
    return total


def _fitting_step(
    accelerator: Any, objective: Any, optimizer: Any, teacher: Any, batch: Batch, plan: Plan, micro: int
) -> tuple[dict[str, Tensor], Tensor, int]:
    """One step with as many sequences at once as memory holds: out of memory, the micro-batch halves and the step is
    taken again; the global batch stays. Returns the micro-batch that fitted.

    Ranks cannot signal each other that they ran out, so with several of them the error stands.
    """
    while True:
        try:
            return *_step(accelerator, objective, optimizer, teacher, batch, plan, micro), micro
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or accelerator.num_processes > 1 or micro == 1:
                raise
            # The micro-batches before the failure have already added their gradients.
            optimizer.zero_grad()
            micro = (min(micro, len(batch.rows)) + 1) // 2
            log.warning("out of memory: continuing with train.micro_batch_size=%d (the same global batch)", micro)


def _out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; torch's CPU allocator only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _step(
    accelerator: Any, objective: Any, optimizer: Any, teacher: Any, batch: Batch, plan: Plan, micro: int
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step: this rank's share of the batch, in micro-batches; the global mean over all labels."""
    mine = batch.share(accelerator.process_index, accelerator.num_processes)
    pieces = list(zip(*(part.split(micro) for part in mine), strict=True))
    sums: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        inputs, labels = (part.to(accelerator.device) for part in piece[:2])
        last = i + 1 == len(pieces)
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            targets = _teach(accelerator, teacher, inputs, piece[2]) if plan.distill.kd_weight > 0 else None
            with accelerator.autocast():
                loss, parts = objective(inputs, labels, targets, batch.label_count)
            # Data-parallel wrappers average gradients over ranks; each loss is already divided by the global count.
            accelerator.backward(loss * accelerator.num_processes)
        sums = {k: sums.get(k, 0) + v for k, v in parts.items()}
    norm = checkpoint.whole(accelerator.clip_grad_norm_(objective.parameters(), plan.optim.clip))
    optimizer.step()
    optimizer.zero_grad()
    # Each part is already divided by the label count of all ranks, so their sum is the mean.
    return {k: accelerator.reduce(v, "sum") for k, v in sums.items()}, norm


@torch.no_grad()
def _teach(accelerator: Any, teacher: Any, inputs: Tensor, sequences: Tensor) -> tuple | SparseTargets:
    if isinstance(teacher, Signal):
        return teacher.targets(sequences.numpy()).to(accelerator.device)
    with accelerator.autocast():
        weight = output_weight(teacher).to(inputs.device)
        return hidden_states(teacher, inputs), weight, logit_cap(teacher.config)


def _point(
    accelerator: Any, parts: dict[str, Tensor], norm: Tensor, step: int, rate: float, plan: Plan, length: int
) -> dict:
    """One point of the history; a loss or gradient that is not finite ends the run here."""
    seen = min((step + 1) * plan.optim.batch_size, len(plan.order)) * length
    point = {"step": step + 1, "tokens": seen, "learning_rate": rate, "grad_norm": float(norm)}
    point |= {k: float(v) for k, v in parts.items()}
    if not all(math.isfinite(v) for v in point.values()):
        raise StageError(
            f"the loss is no longer finite at step {step + 1} of {plan.steps}: "
            + ", ".join(f"{k} {point[k]:.4g}" for k in (*parts, "learning_rate", "grad_norm"))
            + f". Lower the peak learning rate ({plan.peak:.3g}: train.learning_rate, for a teacher "
            "family.pretrain.learning_rate) or raise train.warmup."
        )
    return point
