"""How large the student is along every axis. Needs no torch: a grid is planned with this.

A shape is found by one rule, `shrink`: among all hidden sizes and head counts, with neurons absorbing what is left so
that the total is exact, take the one that keeps the axes most nearly in proportion. Applied to one teacher this is the
paper's even split of sparsity over the width axes (METHOD §3, p' = 1 − √(1 − p) on each); applied to the elementwise
minimum of all larger rungs it gives the common student, which is the same for every teacher.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from capacity_gap.errors import ConfigError, ImpossibleCell
from capacity_gap.models.axes import Architecture, Config, Dims, architecture, config_with, count, dims

TOLERANCE = 0.005  # how far a student's size may be from what was asked for


@dataclass(frozen=True)
class Shape:
    """The sizes of a student and its parameters. `heads` are query heads; a unit is a key-value head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    layers: int
    params: int


def choose_shape(
    config: Config,
    target_params: int,
    policy: str = "local",
    *,
    depth: int | None = None,
    multiple: int = 8,
) -> Shape:
    """The shape of `target_params` parameters for one teacher, its own proportions kept (METHOD §3, *local*).

    Args:
        config: the teacher's config.
        target_params: total parameters wanted; met within 0.5 %.
        policy: `local`: the same number of heads and neurons in every layer.
        depth: layers of the student; the teacher's by default.
        multiple: sizes are multiples of this; 1 at pico size.

    Raises:
        ConfigError: an unknown policy, or no legal shape of this size; the message names the nearest ones.
    """
    if policy != "local":
        raise ConfigError(f"policy={policy!r} is not known. Allowed: local.")
    return shrink(architecture(config), dims(config), target_params, multiple=multiple, depth=depth)


def common_shape(rungs: Mapping[str, Config], target_params: int, *, multiple: int = 8) -> Shape:
    """The one shape for students of this size, a function of the ladder and the size alone.

    A student the size of a rung has that rung's shape. Any other is shrunk from the elementwise minimum of all rungs
    that are larger, so each of them can hold it.
    """
    able = [r for r in rungs.values() if count(architecture(r), dims(r)) >= target_params * (1 - TOLERANCE)]
    if not able:
        raise ConfigError(f"no rung has {target_params:,} parameters or more. Rungs: {' '.join(rungs)}.")
    for rung in able:
        if count(architecture(rung), dims(rung)) <= target_params * (1 + TOLERANCE):
            return _shape(architecture(rung), dims(rung))
    sizes = [dims(r) for r in able]
    least = {a: min(getattr(s, a) for s in sizes) for a in ("hidden", "kv_heads", "neurons", "layers")}
    return shrink(architecture(able[0]), sizes[0].with_units(**least), target_params, multiple=multiple)


def shrink(table: Architecture, full: Dims, target: int, *, multiple: int, depth: int | None = None) -> Shape:
    """The shape of `target` parameters inside `full` whose hidden, heads and neurons are most nearly in proportion."""
    layers = depth or full.layers
    if not 1 <= layers <= full.layers:
        raise ConfigError(f"depth={layers} is not between 1 and the {full.layers} layers there are.")
    if layers == full.layers and abs(count(table, full) / target - 1) <= TOLERANCE:
        return _shape(table, full)
    found = list(_candidates(table, full, target, layers, multiple))
    if not found:
        raise ConfigError(_no_shape(table, full, target, layers, multiple))
    return _shape(table, min(found, key=lambda s: (_distortion(s, full), s.hidden)))


def _candidates(table: Architecture, full: Dims, target: int, layers: int, multiple: int) -> Iterator[Dims]:
    for hidden in range(multiple, full.hidden + 1, multiple):
        for kv_heads in _head_counts(table, hidden, full):
            bare = full.with_units(hidden=hidden, kv_heads=kv_heads, neurons=0, layers=layers)
            each = count(table, full.with_units(hidden=hidden, kv_heads=kv_heads, neurons=1, layers=layers))
            each -= count(table, bare)
            neurons = multiple * round((target - count(table, bare)) / each / multiple)
            if multiple <= neurons <= full.neurons:
                sizes = full.with_units(hidden=hidden, kv_heads=kv_heads, neurons=neurons, layers=layers)
                if abs(count(table, sizes) / target - 1) <= TOLERANCE:
                    yield sizes


def _head_counts(table: Architecture, hidden: int, full: Dims) -> list[int]:
    """Legal numbers of key-value heads: transformers wants hidden sizes to be multiples of the number of heads.

    Where hidden = heads × head_dim, only that number will do.
    """
    counts = range(1, full.kv_heads + 1)
    if table.square:
        return [k for k in counts if hidden == k * full.group * full.head_dim]
    return [k for k in counts if hidden % (k * full.group) == 0]


def _distortion(sizes: Dims, full: Dims) -> float:
    """Spread of the log shares that are kept on the three width axes: 0 when all keep the same share."""
    shares = [math.log(getattr(sizes, a) / getattr(full, a)) for a in ("hidden", "kv_heads", "neurons")]
    mean = sum(shares) / 3
    return sum((s - mean) ** 2 for s in shares)


def _shape(table: Architecture, sizes: Dims) -> Shape:
    return Shape(
        sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.neurons, sizes.layers, count(table, sizes)
    )


def _no_shape(table: Architecture, full: Dims, target: int, layers: int, multiple: int) -> str:
    """Names the legal sizes nearest to the one that cannot be."""
    sizes = sorted(
        count(table, full.with_units(hidden=h, kv_heads=k, neurons=n, layers=layers))
        for h in range(multiple, full.hidden + 1, multiple)
        for k in _head_counts(table, h, full)
        for n in (multiple, max(multiple, full.neurons // multiple * multiple))
    )
    below, above = [s for s in sizes if s < target], [s for s in sizes if s > target]
    near = [f"{s:,}" for s in (*below[-1:], *above[:1])]
    return (
        f"no student of {target:,} parameters can be cut from {full.layers} layers of hidden {full.hidden}, "
        f"{full.kv_heads} key-value heads, {full.neurons} neurons ({count(table, full):,} parameters) keeping {layers} "
        f"layers and multiples of {multiple}. The nearest sizes that can: {' and '.join(near)}."
    )


def unfit(shape: Shape, teacher: Dims) -> list[str]:
    """Why a student of this shape cannot be cut from this teacher; empty if it can."""
    reasons = []
    for axis in ("hidden", "kv_heads", "neurons", "layers"):
        if getattr(shape, axis) > getattr(teacher, axis):
            reasons.append(f"{axis} {getattr(shape, axis)} > {getattr(teacher, axis)}")
    if shape.head_dim != teacher.head_dim:
        reasons.append(f"head_dim {shape.head_dim} ≠ {teacher.head_dim}")
    if shape.heads * teacher.kv_heads != shape.kv_heads * teacher.heads:
        reasons.append(f"{shape.heads} heads in {shape.kv_heads} groups, teacher {teacher.heads} in {teacher.kv_heads}")
    return reasons


def student_config(
    rungs: Mapping[str, Config], teacher: Mapping[str, Any], target: int, *, policy: str, multiple: int
) -> dict[str, Any]:
    """The student's config.json under a shape policy: `common`, or `per_teacher` (the paper's).

    Raises:
        ImpossibleCell: this teacher cannot hold the common shape.
    """
    if policy == "per_teacher":
        shape = choose_shape(teacher, target, multiple=multiple)
    else:
        shape = common_shape(rungs, target, multiple=multiple)
    if reasons := unfit(shape, dims(teacher)):
        raise ImpossibleCell(
            f"the teacher cannot hold the common student of {target:,} parameters: {'; '.join(reasons)}. "
            "Take a larger teacher, or prune.shape=per_teacher."
        )
    return config_with(teacher, sized(dims(teacher), shape))


def sized(teacher: Dims, shape: Shape) -> Dims:
    """The teacher's dims with a student's sizes."""
    return teacher.with_units(hidden=shape.hidden, kv_heads=shape.kv_heads, neurons=shape.neurons, layers=shape.layers)
