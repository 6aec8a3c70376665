"""Answers of a goal as the store notes them. Imports no torch."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from capacity_gap.fit import Goal
    from capacity_gap.fit.regression import Estimate


def both_answers(
    frame: "pd.DataFrame", goal: "Goal", noted_level: float | None, *, ended: bool = False
) -> tuple[list[float | None] | None, dict[str, Any] | None]:
    """The answer and, after rounds that ended at a narrow interval, the one to report with its level.

    Args:
        frame: the finished cells.
        goal: the quantity to estimate.
        noted_level: the level noted with such an end, if there was one: a lower one is not reported any more.
        ended: it is such an end now. A smaller `until` then goes on, so the answer's factor is given too.
    """
    from capacity_gap.fit.goal_answer import AFTER_STOPPING, answers
    from capacity_gap.fit.joint_curve import LEVEL

    if noted_level is None:
        return ends_of(answers(frame, goal, (LEVEL,)).get(LEVEL)), None
    level = max(noted_level, AFTER_STOPPING)
    found = answers(frame, goal, (LEVEL, level))
    so_far = ends_of(found.get(LEVEL))
    factor = so_far[2] / so_far[1] if ended and so_far and so_far[1] and so_far[2] else None
    return so_far, {"level": level, "answer": ends_of(found.get(level)), "factor": factor}


def ends_of(found: "Estimate | None") -> list[float | None] | None:
    """Value and ends of an interval, None where one is not finite."""
    if found is None:
        return None
    return [float(x) if math.isfinite(x) else None for x in (found.value, *found.interval)]
