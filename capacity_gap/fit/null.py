"""Checks of a law against chance, without the outer rungs, and without single teachers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from capacity_gap.fit.frame import Curve
from capacity_gap.fit.valley import LEAST_TEACHERS, Design, Grid

PERMUTATIONS = 999


def null_p_value(found: Sequence[Curve], *, seed: int = 0, permutations: int = PERMUTATIONS) -> float | None:
    """How often permuted teachers give as much convexity as observed.

    The statistic is the sum over curves of `max(0, c)²/Var(c)`, c the quadratic coefficient. One random ranking of all
    teachers reorders every curve at once, so that one teacher's error, shared by all students, is part of the null.
    """
    usable = [c for c in found if len(c.x) >= LEAST_TEACHERS]
    if not usable:
        return None
    generator = np.random.default_rng(seed)
    teachers = np.unique(np.concatenate([c.teacher_params for c in usable]))
    ranks = np.argsort(generator.random((permutations, len(teachers))), axis=1)
    seen, drawn = 0.0, np.zeros(permutations)
    for curve in usable:
        contrast = _curvature_contrast(curve)
        mine = ranks[:, np.searchsorted(teachers, curve.teacher_params)]
        # Ranks among the curve's own teachers: one random ranking serves curves that lack some teachers.
        shuffled = np.argsort(np.argsort(mine, axis=1), axis=1)
        # Var(c) is taken in proportion to the curve's own variance, which a permutation leaves as it is.
        scale = curve.loss.std() or 1.0
        seen += max(0.0, float(contrast @ curve.loss) / scale) ** 2
        drawn += np.maximum(0.0, curve.loss[shuffled] @ contrast / scale) ** 2
    return float((1 + (drawn >= seen * (1 - 1e-12)).sum()) / (1 + permutations))


def _curvature_contrast(curve: Curve) -> np.ndarray:
    """Unit vector v with `v·loss` the quadratic coefficient over its standard error at unit noise [K]."""
    u = curve.x - curve.x.mean()
    # Orthogonal to constant and line, so that a trend alone counts as no convexity.
    q, _ = np.linalg.qr(np.stack([np.ones_like(u), u, u * u], axis=1))
    return q[:, 2] * np.sign(q[:, 2] @ (u * u))


def without(curve: Curve, drop: np.ndarray) -> Curve:
    """The curve without the teachers marked in `drop` [K]."""
    keep = ~drop
    names = tuple(n for n, k in zip(curve.clusters, keep, strict=True) if k) if curve.clusters else ()
    return replace(
        curve,
        teacher_params=curve.teacher_params[keep],
        loss=curve.loss[keep],
        count=curve.count[keep],
        clusters=names,
        size_off=None if curve.size_off is None else curve.size_off[keep],
    )


def without_outer(found: Sequence[Curve]) -> list[Curve]:
    """Every curve without its smallest and largest teacher, where enough are left."""
    ends = [np.isin(np.arange(len(c.x)), (0, len(c.x) - 1)) for c in found]
    return [without(c, e) for c, e in zip(found, ends, strict=True) if len(c.x) >= LEAST_TEACHERS + 2]


def rests_on(found: Sequence[Curve], least: int) -> tuple[float, ...]:
    """The teachers without which fewer than `least` students keep a minimum inside their grid.

    Args:
        found: the curves with an interior optimum.
        least: students that must keep theirs.
    """
    teachers = np.unique(np.concatenate([c.teacher_params for c in found]))
    cases = [(t, without(c, c.teacher_params == t)) for t in teachers for c in found]
    keep: dict[float, set] = {float(t): set() for t in teachers}
    for (teacher, curve), inside in zip(cases, has_inner_minimum([c for _, c in cases]), strict=True):
        if inside:
            keep[float(teacher)].add(curve.key["student"])
    return tuple(t for t, students in keep.items() if len(students) < least)


def has_inner_minimum(found: Sequence[Curve]) -> list[bool]:
    """Whether each curve's minimum is inside its grid, by a parabola; of three teachers, whether the middle is best."""
    verdicts = [bool(c.loss[1:-1].min() < min(c.loss[0], c.loss[-1])) for c in found]
    wide = [i for i, c in enumerate(found) if len(c.x) >= LEAST_TEACHERS]
    if wide:
        grid = Grid.of([found[i] for i in wide])
        design, plain = Design.of(grid, grid.count, (0.0,)), np.array([0])
        best = design.best(design.coefficients(grid.loss[None], plain), plain)[0]
        for i, x, first, last in zip(wide, best, grid.first, grid.last, strict=True):
            verdicts[i] = bool(first + 1e-9 < x < last - 1e-9)
    return verdicts
