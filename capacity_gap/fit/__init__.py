"""Where each student's best teacher lies, and the law that joins them. numpy, scipy, pandas; never torch, never W&B."""

from capacity_gap.fit.curse import Curse, Growth, student_growth
from capacity_gap.fit.law import LawFit, fit_law
from capacity_gap.fit.optimum import Optimum, locate_optima

__all__ = ["Curse", "Growth", "LawFit", "Optimum", "fit_law", "locate_optima", "student_growth"]
