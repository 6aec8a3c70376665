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

from capacity_gap import checkpoint
from capacity_gap.config import DistillConfig, OptimConfig
from capacity_gap.distill.losses import distill_loss
from capacity_gap.distill.signals import Signal
from capacity_gap.distill.sparse import SparseTargets
from capacity_gap.errors import StageError
from capacity_gap.models.loading import hidden_states, output_weight, predicted
from capacity_gap.runtime import Interrupted, Runtime

log = logging.getLogger(__name__)
LOG_EVERY = 10  # steps between points of the history


class Sequences(Protocol):
    """Packed text: `batch(indices)` gives tokens [n, T+1], of which the first T are inputs and the last T labels."""

    @property
    def sequence_length(self) -> int: ...  # noqa: D102

    def batch(self, indices: np.ndarray) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """What one run does, step by step."""

    order: np.ndarray  # the sequences, in the order in which they are seen
    optim: OptimConfig
    distill: DistillConfig
    peak: float  # learning rate
    micro_batch: int  # sequences on one device at once

    @property
    def steps(self) -> int:
        """Optimiser steps; the last one may hold fewer sequences."""
        return math.ceil(len(self.order) / self.optim.batch_size)

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

    def __init__(self, student: Any, distill: DistillConfig) -> None:
        super().__init__()
        self.student = student
        self.distill = distill

    def forward(
        self, tokens: Tensor, labels: Tensor, teacher: tuple | SparseTargets | None, count: float
    ) -> tuple[Tensor, dict]:
        """The loss of one micro-batch and its parts, divided by the label count of the whole step."""
        online = teacher if isinstance(teacher, tuple) else (None, None)
        return distill_loss(
            hidden_states(self.student, tokens),
            output_weight(self.student),
            labels,
            teacher_hidden=online[0],
            teacher_weight=online[1],
            signal=teacher if isinstance(teacher, SparseTargets) else None,
            loss=self.distill.loss,
            kd_weight=self.distill.kd_weight,
            temperature=self.distill.temperature,
            tau_squared=self.distill.tau_squared,
            skew=self.distill.skew,
            label_count=count,
        )


def learning_rate(step: int, steps: int, optim: OptimConfig, peak: float) -> float:
    """The rate of step 0 … steps − 1: a linear warm-up, then the schedule.

    `cosine` and `wsd` (constant, then linear decay over the last `optim.decay` of the steps) end at
    `optim.final`·peak; `constant` stays.
    """
    warm = max(1, round(optim.warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    if optim.schedule == "constant":
        return peak
    start = warm if optim.schedule == "cosine" else max(warm, round((1 - optim.decay) * steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return peak * (optim.final + (1 - optim.final) * fall)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on norms and biases (METHOD §4)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def make_accelerator(runtime: Runtime, precision: str, student: Any) -> Any:
    """Hugging Face Accelerate, set up afresh: one process trains many models, not always alike.

    With several ranks: data-parallel, or with `train.sharding=fsdp` sharded layer by layer.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = None
    if runtime.sharding == "fsdp" and runtime.ranks.size > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(student._no_split_modules),
            cpu_ram_efficient_loading=False,
        )
    return Accelerator(
        cpu=runtime.device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no", fsdp_plugin=plugin
    )


def autocast(device: str, precision: str) -> Any:
    """The context in which a model computes at `precision`."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")


def train(
    student: Any,
    sequences: Sequences,
    plan: Plan,
    *,
    runtime: Runtime,
    checkpoints: Path,
    teacher: Any = None,
    precision: str = "fp32",
    on_log: Callable[[dict], None] = lambda point: None,
) -> TrainResult:
    """Trains `student` in place on the sequences that `plan` orders.

    Args:
        student: a causal language model.
        sequences: the packed text that `plan.order` indexes.
        plan: order, optimiser, objective, learning rate.
        runtime: device, progress, interruption.
        checkpoints: folder for checkpoints; a run found there is continued.
        teacher: gives the soft targets: a model, or a cached `Signal`; needed if `plan.distill.kd_weight` > 0.
        precision: `fp32`, or `bf16` autocast.
        on_log: called with each logged point.

    Returns:
        The result; each point of its history has step, tokens, ce, (kl, teacher_entropy,) learning_rate, grad_norm.

    Raises:
        StageError: the loss is no longer finite.
        Interrupted: the process was asked to stop; a checkpoint was written.
    """
    accelerator = make_accelerator(runtime, precision, student)
    student.to(accelerator.device).train()
    if isinstance(teacher, nn.Module):
        teacher.to(accelerator.device).eval()
    bare = Objective(student, plan.distill)
    optimizer = make_optimizer(student, plan.optim)
    objective, prepared = accelerator.prepare(bare, optimizer)
    labels = predicted(student, sequences.sequence_length)
    start, history = checkpoint.load(checkpoints, student, optimizer)
    clock, saved, tokens, micro = time.monotonic(), time.monotonic(), 0, plan.micro_batch

    for step in range(start, plan.steps):
        rate = learning_rate(step, plan.steps, plan.optim, plan.peak)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = Batch(sequences.batch(plan.sequences(step)), plan.sequences(step), labels)
        parts, norm, micro = _fitting_step(accelerator, objective, prepared, teacher, batch, plan, micro)
        tokens += len(batch.rows) * sequences.sequence_length
        last = step + 1 == plan.steps
        if step % LOG_EVERY == 0 or last:
            point = _point(accelerator, parts, norm, step, rate, plan, sequences.sequence_length)
            history.append(point)
            on_log({**point, "tokens_per_s": tokens / max(1e-9, time.monotonic() - clock)})
        runtime.report(step + 1, plan.steps, "steps")
        due = time.monotonic() - saved > 60 * runtime.checkpoint_minutes
        if not last and runtime.ranks.any(due or runtime.stop.is_set()):
            checkpoint.save(checkpoints, step + 1, student, optimizer, history, leads=runtime.ranks.leads)
            saved = time.monotonic()
            if runtime.ranks.any(runtime.stop.is_set()):
                raise Interrupted
    student.eval()
    wall = time.monotonic() - clock
    peak = _peak_memory(runtime.device)
    return TrainResult(plan.steps, tokens, wall, tokens / max(1e-9, wall), peak, micro, history)


def _fitting_step(
    accelerator: Any, objective: Any, optimizer: Any, teacher: Any, batch: Batch, plan: Plan, micro: int
) -> tuple[dict[str, Tensor], Tensor, int]:
    """One step with as many sequences at once as memory holds: out of memory, the micro-batch halves and the step is
    taken again; the global batch stays. Returns the micro-batch that fitted.

    Ranks cannot tell each other that they ran out, so with several of them the error stands.
    """
    while True:
        try:
            return *_step(accelerator, objective, optimizer, teacher, batch, plan, micro), micro
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or accelerator.num_processes > 1 or micro == 1:
                raise
            optimizer.zero_grad()
            micro = (min(micro, len(batch.rows)) + 1) // 2
            log.warning("out of memory: going on with train.micro_batch_size=%d (the same global batch)", micro)


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
    return {k: accelerator.reduce(v, "sum") for k, v in sums.items()}, norm


@torch.no_grad()
def _teach(accelerator: Any, teacher: Any, inputs: Tensor, sequences: Tensor) -> tuple | SparseTargets:
    if isinstance(teacher, Signal):
        return teacher.targets(sequences.numpy()).to(accelerator.device)
    with accelerator.autocast():
        return hidden_states(teacher, inputs), output_weight(teacher)


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


def _peak_memory(device: str) -> int:
    """Most memory ever held: on CUDA by torch's allocator, else by this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
