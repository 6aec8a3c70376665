"""What the cells so far say of a goal, and when that is narrow enough to end rounds of cells.

Some intervals are narrow by chance, and rounds that end at a narrow one end at these too. It then holds the true value
less often than it says, so the interval of a higher level is reported. The level was chosen on simulated rounds
(`benchmarks/next_stops.py`) and judged on other seeds; docs/next.md has both.
"""

import math
from collections.abc import Sequence

import pandas as pd

from capacity_gap.fit.joint_curve import LEVEL
from capacity_gap.fit.joint_fit import JointFit, fit_joint
from capacity_gap.fit.next_model import Goal
from capacity_gap.fit.regression import Estimate

AFTER_STOPPING = 0.995  # the level reported after a narrow interval ended the rounds


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


def narrow_enough(found: Estimate | None, until: float | None) -> bool:
    """Whether the interval's upper end is at most `until` times its lower one."""
    if found is None or until is None:
        return False
    low, high = found.interval
    return bool(math.isfinite(found.value) and low > 0 and high / low <= until)
