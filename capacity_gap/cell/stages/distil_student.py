"""The stage `distil`: the student, trained under its teacher, or alone with kd_weight 0."""

from collections.abc import Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.cache_signal import signal_stage
from capacity_gap.cell.stages.run_training import optimizer_identity, run_training, training_stage
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.distill.divergences import LOSSES
from capacity_gap.models import accounting
from capacity_gap.models.axes import dims
from capacity_gap.settings.hashing import identity_fields
from capacity_gap.store.stage import Stage, StageRun


def distil_stage(
    cell: ResolvedCell, student: Stage, shape: Mapping[str, Any], teacher: Stage, tokens: Stage, *, budget: int
) -> Stage:
    """`student`, of this shape, trained on `budget` tokens."""
    c = cell.config
    given = {
        "tokens": budget,
        "epochs": c.epochs,
        "seed": c.seed,
        "distill": identity_fields(c.distill),
        **optimizer_identity(c.train, dims(shape).hidden),
        **cell.dynamics,
        **LOSSES.entry(c.distill.loss).identity_as("loss"),
    }
    inputs = {"student": student, "tokens": tokens}
    teacher_flops = 0.0
    if c.distill.kd_weight > 0 and c.distill.signal != "online":
        inputs["signal"] = signal_stage(cell, teacher, tokens, budget=budget)
    elif c.distill.kd_weight > 0:
        inputs["teacher"] = teacher
        teacher_flops = accounting.forward_flops(cell.teacher_shape, budget)
    return training_stage(cell, "distil", given, inputs, distil, shape, teacher_flops=teacher_flops)


def distil(run: StageRun) -> None:
    """Trains the student."""
    from capacity_gap.models.loading import load_model

    teacher = _teacher(run)
    run_training(
        run, load_model(run.inputs["student"]), distill=DistillConfig(**run.config["distill"]), teacher=teacher
    )


def _teacher(run: StageRun) -> Any:
    """What the student learns from: a model, its cached signal, or nothing."""
    if "signal" in run.inputs:
        from capacity_gap.distill.signals import Signal

        return Signal(run.inputs["signal"])
    if "teacher" in run.inputs:
        from capacity_gap.models.placing import load_teacher

        return load_teacher(run.inputs["teacher"], run.runtime)
    return None
