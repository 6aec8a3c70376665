"""What the stages `teacher`, `adapt` and `distil` share: the identity of a training run, and how it is carried out."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import METRICS, RESULT, ignored_in_training, packed_split
from capacity_gap.data import packing
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models import accounting
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun
from capacity_gap.training.train_config import OptimConfig
from capacity_gap.training.trunk import nested_order

STATE = "state"  # of a trunk: the folder of weights and optimiser that others go on from


def training_stage(
    cell: ResolvedCell,
    name: str,
    given: Mapping[str, Any],
    inputs: Mapping[str, Stage],
    compute: Callable[[StageRun], None],
    shape: Mapping[str, Any],
    *,
    teacher_flops: float = 0.0,
    held: str = "fp32",
    begins: int = 0,
    ends: int | None = None,
) -> Stage:
    """A stage of the one training loop, on `given["tokens"]` tokens.

    Args:
        cell: whose settings count.
        name: of the stage.
        given: its identity, without what every training stage has.
        inputs: by name.
        compute: its function.
        shape: config.json of the model that is trained.
        teacher_flops: of a teacher that runs beside it.
        held: the type in which its start was held.
        begins: tokens that another stage has seen for it.
        ends: tokens after which it ends, if not all.
    """
    budget = (given["tokens"] if ends is None else ends) - begins
    given = {**given, **cell.arithmetic, **cell.compiled, **ignored_in_training(cell, shape)}
    cost, passes = accounting.train_flops(shape, budget) + teacher_flops, (4 if teacher_flops else 3) * budget
    version = 2 if "bf16" in (given["precision"], held) else 1  # of outputs in fp32, of teachers adapted in bf16
    return Stage(name, version, given, inputs, compute, cost, cell.how_trained, passes=passes, collective=True)


def optimizer_identity(optim: OptimConfig, hidden: int) -> dict[str, Any]:
    """An optimiser's identity: its learning rate is hashed as a number, however it was set."""
    names = [f for f in OptimConfig.__dataclass_fields__ if not f.startswith("learning_rate")]
    return {"optim": {name: getattr(optim, name) for name in names}, "learning_rate": optim.peak(hidden)}


def run_training(run: StageRun, model: Any, *, distill: DistillConfig, teacher: Any = None) -> None:
    """Trains `model` as the stage says; writes model, history and result.

    Args:
        run: the stage.
        model: in its initial state.
        distill: the objective.
        teacher: a model, its cached signal, or None.
    """
    from capacity_gap.models.loading import save_model
    from capacity_gap.training.loop import Plan, train
    from capacity_gap.training.trunk import Branch

    given = run.config
    trunk = given.get("trunk")
    is_part = trunk is not None and trunk["leave"] is None  # of a trunk: no model of its own
    plan = Plan(
        order=_order(run),
        branch=Branch(trunk["warm"], trunk["leave"]) if trunk else None,
        optim=OptimConfig(**given["optim"], learning_rate=given["learning_rate"]),
        distill=distill,
        peak=given["learning_rate"],
        evaluate_every=given.get("evaluate_every", 0),
        **_execution(run),
    )
    result = train(
        model,
        packed_split(run, "train"),
        plan,
        runtime=run.runtime,
        checkpoints=run.checkpoint,
        teacher=teacher,
        held_out=packed_split(run, "validation") if plan.evaluate_every else None,
        precision=given["precision"],
        on_log=run.runtime.on_log,
        begin=run.inputs["trunk"] / STATE if "trunk" in run.inputs else None,
        leave=run.out / STATE if is_part else None,
    )
    if not is_part:
        save_model(model, run.out, leads=run.runtime.ranks.leads)
    (run.out / METRICS).write_text("".join(json.dumps(point) + "\n" for point in result.history))
    write_json(
        run.out / RESULT,
        {
            "steps": result.steps,
            "tokens": result.tokens,
            "tokens_per_s": result.tokens_per_s,
            "mfu": result.mfu,
            "signal_bytes_per_token": getattr(teacher, "bytes_per_token", None),
            "peak_memory_bytes": result.peak_memory_bytes,
            "micro_batch": result.micro_batch,
        },
    )


def _order(run: StageRun) -> Any:
    """The sequences of the budget in the order in which they are seen."""
    budget, epochs, seed = (run.config[key] for key in ("tokens", "epochs", "seed"))
    skip = run.config.get("offset", 0)
    if trunk := run.config.get("trunk"):
        packed = packed_split(run, "train")
        edges = [tokens // packed.sequence_length for tokens in trunk["budgets"]]
        found = nested_order(packing.subset(packed, budget, skip=skip), edges, seed)
        return found[: trunk["ends"] * run.config["optim"]["batch_size"]] if trunk["leave"] is None else found
    chosen = packing.subset(packed_split(run, "train"), budget, epochs=epochs, skip=skip)
    return packing.order(chosen, seed, epochs=epochs)


def _execution(run: StageRun) -> dict[str, Any]:
    """How a plan is carried out, from the stage's options."""
    options = {k: v for k, v in run.options.items() if k != "micro_batch_size"}
    micro = run.options["micro_batch_size"] or run.config["optim"]["batch_size"]
    return {"micro_batch": micro, "compile": run.config.get("compile", False), **options}
