"""The ratio law `N_T* = r·N_S` over the located optima, tested against a permutation null.

A parabola through noise has a minimum somewhere, and on a grid of 1× to 8× that is at 2.9× on average: a ratio alone is
no evidence. So a law is claimed only if at least three students have interior optima, *and* the curvature of the curves
beats a permutation of teachers within students, *and* neither a single teacher nor the grid's outer rungs carry the
claim.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from capacity_gap.fit.curse import curses
from capacity_gap.fit.frame import Curve, curves
from capacity_gap.fit.law_fit import LEAST_STUDENTS, LawFit
from capacity_gap.fit.null import has_inner_minimum, null_p_value, rests_on, without_outer
from capacity_gap.fit.optimum import BOOTSTRAPS, Located, locate
from capacity_gap.fit.regression import (
    NAMED,
    Estimate,
    Responses,
    agreements,
    covariates,
    forms_of,
    regress,
    two_sided,
    without_bounds_alone,
)
from capacity_gap.fit.valley import LEAST_TEACHERS
from capacity_gap.records.columns import BY

LEVEL = 0.05
KEPT_DRAWS = 200

Pair = tuple[float, float] | None


def fit_law(
    frame: pd.DataFrame,
    *,
    metric: str | None = None,
    axis: str = "total",
    by: Sequence[str] = BY,
    method: str = "asymmetric",
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> LawFit:
    """Fits the ratio law to a table of runs; doubtful results get a status, and only impossible input raises.

    Args:
        frame: tidy table, one row a run; needs `student_params, teacher_params` and `loss` (or `student_loss`).
        metric: the column to minimise, if another.
        axis: `total` or `non_embedding` parameters.
        by: columns that part curves.
        method: of `locate_optima`.
        bootstraps: draws of the whole chain: cells → optima → law.
        seed: of the draws and the permutations.
    """
    found, notes = curves(frame, metric=metric, axis=axis, by=by)
    return law_of(found, axis=axis, notes=notes, method=method, bootstraps=bootstraps, seed=seed)


def law_of(
    found: Sequence[Curve],
    *,
    axis: str,
    notes: Sequence[str] = (),
    method: str = "asymmetric",
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> LawFit:
    """`fit_law` on curves."""
    return law_from(locate(found, method=method, bootstraps=bootstraps, seed=seed), axis=axis, notes=notes, seed=seed)


def law_from(located: Located, *, axis: str, notes: Sequence[str] = (), seed: int = 0) -> LawFit:
    """`fit_law` on located optima."""
    p = null_p_value(located.found, seed=seed)
    blamed, outer = _blamed(located), _rests_on_outer(located)
    status = _status(located, p, bool(blamed) or outer)
    common: dict[str, Any] = {
        "status": status,
        "axis": axis,
        "optima": located.optima,
        "null_p": p,
        "method": located.method,
        "kappa": located.kappa,
        "rests_on": blamed,
        "rests_on_outer": outer,
        "curses": curses(located, seed=seed),
    }
    if status != "law":
        names = ("ratio", "ratio_interval", "slope", "slope_interval", "without_outer_rungs")
        empty: dict[str, Any] = dict.fromkeys(names)
        return LawFit(**common, **empty, notes=tuple(notes))
    return LawFit(**common, **_estimated(located, notes, seed))


def _estimated(located: Located, notes: Sequence[str], seed: int) -> dict[str, Any]:
    """The estimates of a fit whose status is `law`."""
    responses = Responses.of(located, [i for i, o in enumerate(located.optima) if o.status in NAMED])
    responses, said = without_bounds_alone(responses)
    # Covariates leave at least as many optima to the ratio as a law needs students.
    Z, names, left = covariates(responses, room=max(0, int(responses.seen.sum()) - LEAST_STUDENTS))
    forms, proportional, power = forms_of(responses, Z, seed=seed)
    r, b = forms["proportional"].parameters["r"], forms["power"].parameters["b"] if power else None
    outer = _outer_ratio(located, seed)
    draws = power.draws if power else np.stack([proportional.draws[:, 0], np.ones(len(proportional.draws))], 1)
    said += [f"{n} is not a covariate of the law" for n in left]
    if outer is None:
        said.append("the ratio could not be refitted without the outer rungs, which needs six teachers per student")
    return {
        "ratio": r.value,
        "ratio_interval": r.interval,
        "slope": b and b.value,
        "slope_interval": b and b.interval,
        "without_outer_rungs": outer and outer.value,
        "without_outer_interval": outer and outer.interval,
        "forms": forms,
        "effects": {
            n: Estimate.of(proportional.beta[1 + i], proportional.draws[:, 1 + i]) for i, n in enumerate(names)
        },
        "agreements": agreements(responses, seed=seed),
        "tests": {
            "r = 2.5": two_sided(proportional.draws[:, 0], float(np.log(2.5))),
            **({"b = 1": two_sided(power.draws[:, 1], 1.0)} if power else {}),
        },
        "draws": tuple((round(float(x), 5), round(float(y), 5)) for x, y in draws[:KEPT_DRAWS]),
        "notes": (*notes, *said),
    }


def _status(located: Located, p: float | None, doubtful: bool) -> str:
    optima = located.optima
    students = {o.student for o in optima if o.teachers >= LEAST_TEACHERS}
    if len(students) < LEAST_STUDENTS:
        return "too_few"
    interior = {o.student for o in optima if o.status == "interior"}
    if len(interior) >= LEAST_STUDENTS and p is not None and p <= LEVEL and not doubtful:
        return "law"
    edges = sum(o.status in ("left_edge", "right_edge") for o in optima)
    return "censored" if edges >= max(1, len(optima) / 2) else "no_optimum"


def _blamed(located: Located) -> tuple[float, ...]:
    """Teachers without which no law could be claimed; empty where none could be claimed anyway."""
    interior = [c for c, o in zip(located.found, located.optima, strict=True) if o.status == "interior"]
    if len({c.key["student"] for c in interior}) < LEAST_STUDENTS:
        return ()
    return rests_on(interior, LEAST_STUDENTS)


def _rests_on_outer(located: Located) -> bool:
    """Whether a law is lost without each curve's first and last teacher, where six or more teachers allow the test."""
    interior = [c for c, o in zip(located.found, located.optima, strict=True) if o.status == "interior"]
    inner = without_outer(interior)
    students = {c.key["student"] for c in inner}
    if len(students) < LEAST_STUDENTS:
        return False
    kept = {c.key["student"] for c, inside in zip(inner, has_inner_minimum(inner), strict=True) if inside}
    return len(kept) < LEAST_STUDENTS


def _outer_ratio(located: Located, seed: int) -> Estimate | None:
    """The ratio from the same curves without their smallest and largest teachers, or None if too little is left."""
    inner = without_outer(located.found)
    if not inner:
        return None
    again = locate(inner, method=located.method, seed=seed)
    responses = Responses.of(again, range(len(inner)))
    responses = responses.part(responses.seen)
    if len(set(responses.students)) < 2:
        return None
    fit = regress(responses, np.ones((len(responses.y), 1)), responses.log_student, seed=seed)
    return Estimate.of(np.exp(fit.beta[0]), np.exp(fit.draws[:, 0]))
