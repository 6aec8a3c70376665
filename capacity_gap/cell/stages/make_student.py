"""The stage `student`: the student before training, cut from its teacher or with random weights."""

import json
from collections.abc import Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.get_teacher import published_stage
from capacity_gap.models.axes import architecture_identity, dims
from capacity_gap.models.checkpoints import Checkpoint
from capacity_gap.models.defaults import frozen_rows
from capacity_gap.models.layers import renumbered
from capacity_gap.pruning.methods import SYMMETRIC
from capacity_gap.store.stage import Stage, StageRun


def random_student_stage(cell: ResolvedCell) -> Stage:
    """Random initialisation, which does not depend on a teacher."""
    given = {"shape": cell.student_shape, "seed": cell.config.seed, "init": "random"}
    if ignored := frozen_rows(cell.student_shape):
        given["ignored"] = ignored
    return Stage("student", 1, given, {}, initialise_student)


def trained_student_stage(cell: ResolvedCell, start: Checkpoint) -> Stage:
    """A trained model: nothing is cut, so that it is the same under every teacher. It learns in fp32."""
    given = {"init": "pretrained", "shape": cell.student_shape, **start.identity, "dtype": "fp32"}
    return published_stage("student", {**given, "quantization": "none"}, start.source, start)


def cut_student_stage(
    cell: ResolvedCell,
    model: Stage,
    scores: Stage,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    last: bool = False,
) -> Stage:
    """A model of shape `before` cut to `after`; `last`: it is the student, and no step on the way to it."""
    c = cell.config.prune
    given: dict[str, Any] = {"init": "pruned", "shape": after}
    if cell.layer_score:
        given["layers"] = cell.layer_score
    if renumbered(before, dims(before).layers, dims(after).layers, symmetric=cell.layer_score is None):
        given["by_layer"] = "kept"  # what belongs to a layer's number goes with the layer
    if last and c.priority == "global":
        given |= {"priority": c.priority, "multiple": cell.multiple}
    given |= architecture_identity(before)
    return Stage("student", 1, given, {"teacher": model, "scores": scores}, cut_student)


def cut_student(run: StageRun) -> None:
    """Cuts the student out of its teacher: in memory, or shard by shard where that is a published checkpoint."""
    from capacity_gap.models.loading import checkpoint_folder, load_model, save_model
    from capacity_gap.pruning.proof import check_proved
    from capacity_gap.pruning.scores import Scores
    from capacity_gap.pruning.shape import shape_of, spread
    from capacity_gap.pruning.surgery import prune, prune_checkpoint

    given, teacher, scores = run.config, run.inputs["teacher"], Scores.load(run.inputs["scores"])
    check_proved(json.loads((checkpoint_folder(teacher) / "config.json").read_text()))
    shape, layers = shape_of(given["shape"]), given.get("layers", SYMMETRIC)
    if given.get("priority") == "global":
        config = json.loads((checkpoint_folder(teacher) / "config.json").read_text())
        shape = spread(shape, config, scores, layers=layers, multiple=given["multiple"])
    if checkpoint_folder(teacher) == teacher:
        save_model(prune(load_model(teacher), scores, shape, layers=layers), run.out)
        return
    prune_checkpoint(
        checkpoint_folder(teacher),
        scores,
        shape,
        run.out,
        layers=layers,
        on_tensor=lambda done, total: run.runtime.report(done, total, "tensors"),
    )


def initialise_student(run: StageRun) -> None:
    """Draws random weights."""
    from capacity_gap.models.loading import new_model, save_model

    save_model(new_model(run.config["shape"], run.config["seed"]), run.out)
