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
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import identity_fields
from capacity_gap.store.stage import Stage, StageRun
from capacity_gap.training.trunk import halves, leaves, warm_steps


def distil_stage(
    cell: ResolvedCell, student: Stage, shape: Mapping[str, Any], teacher: Stage, tokens: Stage, *, budget: int
) -> Stage:
    """`student`, of this shape, trained on `budget` tokens."""
    return _trained(cell, "distil", student, shape, teacher, tokens, budget)


def branch_stage(
    cell: ResolvedCell, student: Stage, shape: Mapping[str, Any], teacher: Stage, tokens: Stage
) -> tuple[Stage, list[Stage]]:
    """The same on the cell's budget as a branch of a trunk, and the trunk's parts, first to last.

    A trunk's part ends where the branch of its budget leaves; the next one goes on from there.
    """
    c, length, batch = cell.config.train, cell.sequence_length, cell.batch_size
    assert c.warmup is not None  # the recipe has filled it in
    budgets = halves(cell.data_tokens, length, batch)
    warm = warm_steps(budgets, length, batch, c.warmup)
    if (first := leaves(budgets[0], length, batch, c.decay)) <= warm:
        raise ConfigError(
            f"train.trunk=true: the branch of {budgets[0]:,} tokens would leave at step {first}, within the warm-up of "
            f"{warm}. Use more data, or a smaller train.batch_size, train.warmup or train.decay."
        )
    parts: list[Stage] = []

    def stage(name: str, budget: int, trunk: Mapping[str, Any], ends: int) -> Stage:
        after = parts[-1] if parts else None
        begins = after.config["trunk"]["ends"] * batch * length if after else 0
        return _trained(cell, name, student, shape, teacher, tokens, budget, trunk, after, (begins, ends))

    for i, budget in enumerate(budgets):
        leave = leaves(budget, length, batch, c.decay)
        trunk = {"budgets": budgets[: i + 1], "warm": warm, "leave": None, "ends": leave}
        parts.append(stage("trunk", budget, trunk, leave * batch * length))
    trunk = {"budgets": budgets, "warm": warm, "leave": leave}
    return stage("distil", cell.data_tokens, trunk, cell.data_tokens), parts


def _trained(
    cell: ResolvedCell,
    name: str,
    student: Stage,
    shape: Mapping[str, Any],
    teacher: Stage,
    tokens: Stage,
    budget: int,
    trunk: Mapping[str, Any] | None = None,
    after: Stage | None = None,
    place: tuple[int, int] | None = None,
) -> Stage:
    """A stage that trains the student; `place`: the tokens between which it does so, after another one."""
    c = cell.config
    given = {
        "tokens": budget,
        "epochs": c.epochs,
        "seed": c.seed,
        "distill": identity_fields(c.distill),
        **optimizer_identity(c.train, dims(shape).hidden),
        **cell.dynamics,
        **({"offset": cell.data_offset} if cell.data_offset else {}),
        **LOSSES.entry(c.distill.loss).identity_as("loss"),
        **({"trunk": trunk} if trunk else {}),
    }
    begins, ends = place or (0, budget)
    inputs = {"student": student, "tokens": tokens, **({"trunk": after} if after else {})}
    teacher_flops = 0.0
    if c.distill.kd_weight > 0 and c.distill.signal != "online":
        inputs["signal"] = signal_stage(cell, teacher, tokens, budget=budget)
    elif c.distill.kd_weight > 0:
        inputs["teacher"] = teacher
        teacher_flops = accounting.forward_flops(cell.teacher_shape, ends - begins)
    return training_stage(
        cell, name, given, inputs, distil, shape, teacher_flops=teacher_flops, begins=begins, ends=ends
    )


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
