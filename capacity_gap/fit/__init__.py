"""Each student's best teacher, the law across students, and loss surfaces. Never torch, never W&B."""

from capacity_gap.fit.curse import Curse, Growth, student_growth
from capacity_gap.fit.joint_fit import Best, BreakEven, JointFit, fit_joint
from capacity_gap.fit.law import fit_law
from capacity_gap.fit.law_fit import LawFit
from capacity_gap.fit.next_cells import next_cells, within_budget
from capacity_gap.fit.next_model import Goal
from capacity_gap.fit.optimum import Optimum, locate_optima
from capacity_gap.records.candidate import Candidate
from capacity_gap.surfaces.design import next_runs
from capacity_gap.surfaces.fitting import fit_surface
from capacity_gap.surfaces.runs import teachers_of
from capacity_gap.surfaces.selection import Selection, select_surface
from capacity_gap.surfaces.surface import SurfaceFit, published
from capacity_gap.surfaces.teacher import (
    Teachers,
    best_teacher,
    compute_optimal,
    distil_or_direct,
    distil_or_direct_at_compute,
)

__all__ = [
    "Best",
    "BreakEven",
    "Candidate",
    "Curse",
    "Goal",
    "Growth",
    "JointFit",
    "LawFit",
    "Optimum",
    "Selection",
    "SurfaceFit",
    "Teachers",
    "best_teacher",
    "compute_optimal",
    "distil_or_direct",
    "distil_or_direct_at_compute",
    "fit_joint",
    "fit_law",
    "fit_surface",
    "locate_optima",
    "next_cells",
    "next_runs",
    "published",
    "select_surface",
    "student_growth",
    "teachers_of",
    "within_budget",
]
