"""What the cells so far say of a goal, and when that is narrow enough to end rounds of cells.

Some intervals are narrow by chance, and rounds that end at a narrow one end at these too. It then holds the true value
less often than it says. So few cells never end rounds, and the interval of a higher level is reported. Both numbers
were chosen on simulated rounds (`benchmarks/next_stops.py`) and judged on other seeds; docs/next.md has the results.
"""

import math
from collections.abc import Sequence

import pandas as pd

from capacity_gap.fit.joint_curve import LEVEL
from capacity_gap.fit.joint_fit import JointFit, fit_joint
from capacity_gap.fit.next_model import Goal
from capacity_gap.fit.regression import Estimate

LEAST_CELLS = 24  # before a narrow interval ends rounds
AFTER_STOPPING = 0.99  # the level reported after it
LEAST_GAIN = 0.02  # share of the answer's variance: a round that is expected to remove less is not run


def answer(frame: pd.DataFrame, goal: Goal, *, level: float = LEVEL) -> Estimate | None:
    """The joint model's estimate of a goal: a ratio, parameters or tokens; None where it is not identified.

    Args:
        frame: tidy records.
        goal: the quantity to estimate.
        level: of the interval.
    """
    return answers(frame, goal, (level,)).get(level)


def answers(frame: pd.DataFrame, goal: Goal, levels: Sequence[float]) -> dict[float, Estimate]:
    """`answer` at several levels of one fit, by level; empty where it is not identified."""
    try:
        fit = fit_joint(frame)
        return {level: _by(fit, goal, level) for level in levels}
    except ValueError:
        return {}


def _by(fit: JointFit, goal: Goal, level: float) -> Estimate:
    if goal.kind == "law":
        return fit.ratio_at(level=level)
    assert goal.student_params is not None
    if goal.kind == "target":
        return fit.optimum(goal.student_params, goal.data_tokens, level=level)
    tokens, interval = fit.break_even(goal.student_params, goal.small, goal.large, level=level)
    return Estimate(tokens, interval)


def narrow_twice(
    before: Estimate | None, now: Estimate | None, cells: int, until: float | None, *, least: int = LEAST_CELLS
) -> bool:
    """Whether the answers before and after a round are narrow enough to end rounds.

    One fit of few cells may take its variances for far too small, so one narrow interval ends nothing.
    """
    return cells >= least and narrow_enough(before, until) and narrow_enough(now, until)


def too_little(gain: float, now: Estimate | None) -> bool:
    """Whether a round that removes this share of the answer's variance is not worth its cost."""
    return gain < LEAST_GAIN and now is not None


def narrow_enough(found: Estimate | None, until: float | None) -> bool:
    """Whether the interval's upper end is at most `until` times its lower one."""
    if found is None or until is None:
        return False
    low, high = found.interval
    return bool(math.isfinite(found.value) and low > 0 and high / low <= until)
