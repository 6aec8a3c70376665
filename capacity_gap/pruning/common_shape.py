"""The student's shape by policy: one that all teachers of a ladder can hold, each teacher's in proportion, or fixed."""

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from capacity_gap.models.axes import architecture, config_with, count, dims
from capacity_gap.pruning.shape import (
    TOLERANCE,
    Shape,
    check_room,
    choose_shape,
    fixed_shape,
    shape_of,
    shrink,
    sized,
    unfit,
    with_experts,
)
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from capacity_gap.structure.architecture import Config, Dims, get


def common_shape(
    rungs: Mapping[str, Config],
    target_params: int,
    *,
    multiple: int = 8,
    depth: int | None = None,
    experts: int | None = None,
) -> Shape:
    """The one shape for students of this size, a function of the ladder and the size alone.

    A student the size of a rung has that rung's shape if all larger rungs hold it. Any other is shrunk from the
    elementwise minimum of all rungs that are larger, so each of them can hold it: with the fewest rows of an embedding
    (rows beyond the tokenizer's are padding), and tied only if all are. Rungs that cannot be cut to one shape with most
    others, because their heads have another size or their parameters other names, are left out. Where rungs group
    queries differently, the student takes as few queries to a key-value head as any; under one rung without groups it
    has none, and grouped teachers repeat their key-value heads. Of mixtures it has the fewest experts of any, unless
    told.
    """
    ladder = json.dumps({name: dict(rungs[name]) for name in rungs})
    return _common_shape(ladder, target_params, multiple, depth, experts)


@functools.lru_cache(maxsize=1024)
def _common_shape(ladder: str, target_params: int, multiple: int, depth: int | None, experts: int | None) -> Shape:
    """The same for a ladder as JSON text: every cell of a grid asks for it, and it takes long."""
    able = _alike(json.loads(ladder), target_params)
    sizes = [dims(r) for r in able]
    for rung in able:
        fits = count(architecture(rung), dims(rung)) <= target_params * (1 + TOLERANCE)
        if fits and depth in (None, dims(rung).layers) and experts in (None, dims(rung).experts):
            own = shape_of(rung)
            if not any(unfit(own, s) for s in sizes):
                return own
    least = {a: min(getattr(s, a) for s in sizes) for a in ("hidden", "kv_heads", "neurons", "layers", "experts")}
    group = min(s.group for s in sizes)
    if group == 1:
        least["kv_heads"] = min(s.heads for s in sizes)
    envelope = sizes[0].with_units(**least, group=group)
    vocab, tied = _rows(sizes)
    envelope = with_experts(replace(envelope, vocab=vocab, tied=tied), experts)
    check_room(architecture(able[0]), envelope, target_params, experts)
    return shrink(architecture(able[0]), envelope, target_params, multiple=multiple, depth=depth)


def _alike(rungs: Mapping[str, Config], target_params: int) -> list[Config]:
    """The rungs that are large enough, with the size of heads and then the parameters that most of these have."""
    able = [r for r in rungs.values() if count(architecture(r), dims(r)) >= target_params * (1 - TOLERANCE)]
    if not able:
        raise ConfigError(f"no rung has {target_params:,} parameters or more. Rungs: {' '.join(rungs)}.")
    for kind in (lambda r: dims(r).head_dim, lambda r: dims(r).active, _names):  # what pruning cannot change
        usual = Counter(map(kind, able)).most_common(1)[0][0]
        able = [r for r in able if kind(r) == usual]
    return able


def common_rows(rungs: Mapping[str, Config], target_params: int) -> tuple[int, bool]:
    """Rows of the common student's embedding, and whether its output matrix is the same."""
    return _rows([dims(r) for r in _alike(rungs, target_params)])


def _rows(sizes: Sequence[Dims]) -> tuple[int, bool]:
    return min(s.vocab for s in sizes), all(s.tied for s in sizes)


def _names(config: Config) -> tuple:
    """Which parameters a model has, and the axes of each."""
    return tuple(sorted(architecture(config).parameters.items()))


def student_shape(
    rungs: Mapping[str, Config],
    teacher: Mapping[str, Any],
    target: int,
    *,
    policy: str,
    multiple: int,
    depth: int | None = None,
    experts: int | None = None,
    fixed: str | None = None,
    named: str = "the teacher",
) -> Shape:
    """The student's shape under a shape policy: `common`, `per_teacher` (the paper's), or `fixed`.

    A student the size of its teacher is its teacher, except with `common` under a teacher that is none of `rungs`:
    that one has no say in the shape that all others give. `named` is what an error calls the teacher.

    Raises:
        ImpossibleCell: this teacher cannot hold the shape.
    """
    own = shape_of(teacher)
    whole = depth in (None, own.layers) and experts in (None, own.experts)
    whole = whole and (policy != "common" or teacher in rungs.values())
    if policy != "fixed" and whole and abs(own.params / target - 1) <= TOLERANCE:
        return own
    if policy == "per_teacher":
        shape = choose_shape(teacher, target, multiple=multiple, depth=depth, experts=experts)
    elif policy == "fixed":
        shape = fixed_shape(teacher, fixed or "", target, experts=experts)
    else:
        shape = common_shape(rungs, target, multiple=multiple, depth=depth, experts=experts)
        _check_kind(rungs, teacher, target, named)
    if reasons := unfit(shape, dims(teacher)):
        raise ImpossibleCell(
            f"the {policy} student of {target:,} parameters does not fit into {named}: {'; '.join(reasons)}. "
            f"{PER_TEACHER}, or take {_such(shape, teacher)}.",
            whole=True,
        )
    return shape


@functools.lru_cache(maxsize=1024)
def _usual(ladder: str, target: int) -> Config:
    """A rung of the kind that most of a ladder (JSON) are, among those that are large enough."""
    return _alike(json.loads(ladder), target)[0]


PER_TEACHER = "Add prune.shape=per_teacher (each teacher is then cut to a shape of its own)"


def _such(shape: Shape, teacher: Config) -> str:
    """Which teachers hold one shape."""
    return "larger teachers" if shape.head_dim == dims(teacher).head_dim else "teachers of one head size"


def _check_kind(rungs: Mapping[str, Config], teacher: Mapping[str, Any], target: int, named: str) -> None:
    """Raises `ImpossibleCell` under a teacher whose parameters are not those of most rungs that hold the student."""
    pair = (teacher, _usual(json.dumps({name: dict(rungs[name]) for name in rungs}), target))
    active = [dims(c).active for c in pair]
    if active[0] != active[1] and all(active):
        raise ImpossibleCell(
            f"the common student of {target:,} parameters does not fit into {named}: a token is routed to {active[0]} "
            f"of its experts, but to {active[1]} of the student's. {PER_TEACHER}.",
            whole=True,
        )
    mine, usual = (dict(_names(c)) for c in pair)
    if differ := sorted(set(mine.items()) ^ set(usual.items())):
        kinds = [str(get(config, "model_type")) for config in pair]
        other = f"it is a {kinds[0]}, the student a {kinds[1]}" if kinds[0] != kinds[1] else "both have one model_type"
        raise ImpossibleCell(
            f"the common student of {target:,} parameters does not fit into {named}: {other}, and their weights differ "
            f"in {', '.join(sorted({n for n, _ in differ})[:3])}. {PER_TEACHER}, or take teachers of one "
            "architecture.",
            whole=True,
        )


def student_config(
    rungs: Mapping[str, Config], teacher: Mapping[str, Any], target: int, *, policy: str, multiple: int, **more: Any
) -> dict[str, Any]:
    """The student's config.json under a shape policy; takes and raises what `student_shape` does."""
    shape = student_shape(rungs, teacher, target, policy=policy, multiple=multiple, **more)
    return config_with(teacher, sized(dims(teacher), shape))
