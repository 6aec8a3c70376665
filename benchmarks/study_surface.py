"""The study's loss surface: how the best ratio moves with tokens per parameter, and a forecast of one budget."""

import numpy as np

from benchmarks.study_arms import Arm
from benchmarks.study_tables import counted, markdown, over, within
from capacity_gap.fit import SurfaceFit, best_teacher, fit_surface
from capacity_gap.settings.scales import format_scale

FORECAST = 600_000  # tokens: the budget that was run last


def surface_of(arm: Arm, *, without: int | None = None) -> SurfaceFit:
    """The additive surface of an arm (docs/surfaces.md), whole rungs of teachers bootstrapped; all budgets but one."""
    frame = arm.frame[arm.frame["data_tokens"] != without]
    return fit_surface(frame, "additive", cluster="teacher_params", metric="student_loss")


def surface_table(surface: SurfaceFit) -> str:
    """Its parameters with their intervals, and the null."""
    rows = [[n, f"{v:.3g}", within(surface.intervals.get(n), ".3g")] for n, v in surface.parameters.items()]
    null = "–" if surface.null_p is None else f"{surface.null_p:.3f}"
    rows.append(["share of teacher permutations that fit as well", null, ""])
    return markdown(["parameter", "estimate", "95 % interval"], rows)


def forecast_table(arm: Arm) -> str:
    """Best teacher and losses at this budget, predicted by the surface of all others, beside the observed ones."""
    if FORECAST not in arm.budgets or len(arm.budgets) < 3:
        return markdown([], [])
    surface = surface_of(arm, without=FORECAST)
    there = arm.frame[arm.frame["data_tokens"] == FORECAST]
    seen = {o.student: o for o in arm.fit(FORECAST).optima}
    rows = []
    for (params, student), cells in there.groupby(["student_params", "student"]):
        predicted = best_teacher(surface, student_params=float(params), data_tokens=FORECAST)
        means = cells.groupby("teacher_params")["student_loss"].mean()
        teachers = means.index.to_numpy(float)
        given = {"student_params": np.full(len(teachers), params), "data_tokens": np.full(len(teachers), FORECAST)}
        errors = surface.predict(**given, teacher_params=teachers) - means.to_numpy()
        came = seen[str(student)]
        places = [v for c in (predicted, came) for v in (counted(c.teacher_params), within(c.interval, ",.0f"))]
        rows.append([str(student), *places, came.status, f"{errors.mean():+.3f}", f"{errors.std():.3f}"])
    head = [
        "student",
        "predicted",
        "95 %",
        "observed",
        "95 %",
        "status",
        "loss predicted − observed",
        "standard deviation",
    ]
    return markdown(head, rows)


def contour_table(surface: SurfaceFit, arm: Arm) -> str:
    """The surface's best ratio for each student and budget of an arm."""
    students = sorted({(float(n), str(s)) for n, s in arm.frame[["student_params", "student"]].to_numpy()})
    rows = []
    for params, student in students:
        found = [best_teacher(surface, student_params=params, data_tokens=float(n)) for n in arm.budgets]
        ratios = [f"{f.teacher_params / params:.1f}" if f.teacher_params is not None else f.status for f in found]
        rows.append([student, *(f"{r} ({over(f.interval, params)})" for r, f in zip(ratios, found, strict=True))])
    return markdown(["student", *(f"{format_scale(n)} tokens" for n in arm.budgets)], rows)
