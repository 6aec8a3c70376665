"""The sizes of the student that a cell cuts. Imports no torch."""

from collections.abc import Mapping
from math import gcd
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.named_models import unsaid_student
from capacity_gap.cell.recipes import multiples
from capacity_gap.models.axes import architecture, dims
from capacity_gap.models.ladders import FAMILIES, Family
from capacity_gap.pruning.common_shape import student_shape
from capacity_gap.pruning.prune_config import SHAPES, PruneConfig
from capacity_gap.pruning.shape import Shape
from capacity_gap.settings.errors import ConfigError, ImpossibleCell, UserError
from capacity_gap.settings.scales import parse_scale


def shaped(config: RunConfig, ladder: Family, origin: str, target: int) -> tuple[Shape, int]:
    """The student's sizes, and the largest multiple that its recipe likes for which there are some.

    Args:
        config: of the cell.
        ladder: its teachers.
        origin: the rung that the student is cut from.
        target: parameters of the student.

    Raises:
        ImpossibleCell: this teacher cannot hold the student.
        ConfigError: no teacher has students of this size.
    """
    last: ConfigError | None = None
    for multiple in multiples(config, target, ladder.multiple):
        try:
            shape = student_shape(
                ladder.common_rungs,
                ladder.rungs[origin],
                target,
                policy=config.prune.shape,
                multiple=multiple,
                depth=config.prune.depth,
                experts=config.prune.experts,
                fixed=config.prune.fixed,
                named=f"the teacher {origin}",
            )
        except ImpossibleCell:  # of this teacher; the shape is the same under all
            raise
        except ConfigError as error:
            last = error
        else:
            return shape, gcd(multiple, shape.neurons) if config.prune.fixed else multiple
    assert last is not None
    raise unsaid_student(config, ladder, last)


DEEP = "loss_increase"  # how layers are chosen where some go, unless said


def usual_layer_score(config: RunConfig, ladder: Family, origin: str, shape: Shape) -> str | None:
    """The default way to remove layers for a student of this shape: by a score (docs/real.md).

    None where under no teacher of the ladder any go, so that a curve has one answer; and of encoder–decoders, whose
    layers go from both ends.
    """
    asked = config.prune
    keeps = asked.shape == "per_teacher" and asked.depth is None
    if not asked.cuts or keeps or len(architecture(ladder.rungs[origin]).stacks) > 1:
        return None
    return DEEP if any(dims(rung).layers > shape.layers for rung in ladder.common_rungs.values()) else None


def layers_told(config: RunConfig, ladder: Family, origin: str, shape: Shape) -> dict[str, str]:
    """What a record holds on layer removal if it was left at its default and some teacher of the ladder needs it."""
    usual = None if config.prune.layers else usual_layer_score(config, ladder, origin, shape)
    return {"prune_layers": usual} if usual else {}


def usual_layer_score_of(row: Mapping[str, Any], settings: Mapping[str, str]) -> str | None:
    """The default way to remove layers for a record's student: empty where it is none, None where columns do not tell.

    Args:
        row: its columns.
        settings: its non-default settings that have no column.
    """
    depth, shape = settings.get("prune.depth"), row.get("shape") or "common"
    fixed = None if shape in SHAPES else shape
    if row.get("family") not in FAMILIES:  # a ladder of the user's own: its rungs' layers are not known
        return DEEP if depth or fixed else None
    ladder = FAMILIES[row["family"]]
    try:
        prune = PruneConfig(shape="fixed" if fixed else shape, fixed=fixed, depth=int(depth) if depth else None)
        config = RunConfig(student=str(row["student"]), prune=prune)
        origin = ladder.rung(str(row.get("reference") or row["teacher"]))
        target = ladder.student_params(parse_scale(config.student, key="student"))
        return usual_layer_score(config, ladder, origin, shaped(config, ladder, origin, target)[0]) or ""
    except (KeyError, ValueError, UserError):  # a table that lacks columns, or students that this version cannot make
        return None
