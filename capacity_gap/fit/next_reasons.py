"""Why a cell was chosen: a sentence made from the cells before it, each part of it a fact about them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from capacity_gap.fit.joint import SAME
from capacity_gap.fit.next_model import Belief, Goal
from capacity_gap.records.bills import Bills
from capacity_gap.settings.scales import short_scale

ALIKE = 1.05  # students and budgets this close are those asked about
NEAR = math.log(1.4)  # within this of the seeming optimum a teacher is at it


def reasons(
    belief: Belief,
    goal: Goal,
    frame: pd.DataFrame,
    pool: pd.DataFrame,
    bills: Bills,
    began: np.ndarray,
    chosen: Sequence[int],
) -> list[str]:
    """A sentence for each of the `chosen` cells of the pool, in their order.

    Args:
        belief: what was known before.
        goal: what the cells are for.
        frame: the cells so far.
        pool: the candidates.
        bills: their costs.
        began: [P + 1] which shared parts were paid for before.
        chosen: indices of the pool.
    """
    known = belief.known
    before, told = list(range(known)), []
    paid = began.copy()
    table = pd.concat([frame, pool], ignore_index=True)
    for i in chosen:
        at = known + i
        said = [
            _name(table, at),
            _place(belief, i, before),
            _elsewhere(belief, goal, at),
            _new(belief, table, at, before),
            _teacher(bills, i, began, paid),
        ]
        told.append(f"{said[0]}: {'; '.join(part for part in said[1:] if part)}.")
        paid[bills.needs[i]] = True
        before.append(at)
    return told


def _name(table: pd.DataFrame, at: int) -> str:
    """The teacher, the student, the budget and the seed."""
    row = table.iloc[at]
    student, teacher = (
        str(row[of]) if of in table else short_scale(row[f"{of}_params"]) for of in ("student", "teacher")
    )
    tokens = f" at {short_scale(row['data_tokens'])} tokens" if "data_tokens" in table else ""
    seed = f", seed {row['seed']}" if "seed" in table and pd.notna(row["seed"]) else ""
    return f"{teacher} for {student}{tokens}{seed}"


def _place(belief: Belief, i: int, before: Sequence[int]) -> str:
    """The teacher's position among those of its curve, and relative to the estimated or assumed best one."""
    best = f"{'estimated' if belief.fitted else 'assumed'} best teacher"
    cells, at = belief.cells, belief.known + i
    off = float(cells.teacher[at] - belief.optimum[i])
    mine = [j for j in before if cells.curve[j] == cells.curve[at]]
    if not mine:
        return "first cell of this student and budget, the baseline for its others"
    tried = cells.teacher[mine]
    if abs(off) <= NEAR:
        return f"near the {best}"
    beyond = bool((tried < cells.teacher[at] - SAME).all() if off > 0 else (tried > cells.teacher[at] + SAME).all())
    side = "above" if off > 0 else "below"
    if beyond:
        end = "largest" if off > 0 else "smallest"
        return f"{side} the {best}, and the {end} of this student and budget so far: slope and curvature"
    return f"{side} the {best}"


def _elsewhere(belief: Belief, goal: Goal, at: int) -> str:
    """How a cell of another student or budget than the goal's serves it."""
    cells = belief.cells
    asked = {"students": (cells.student, goal.student_params), "budgets": (cells.data, goal.data_tokens)}
    other = [
        name
        for name, (own, size) in asked.items()
        if size and np.ptp(own) > SAME and abs(own[at] - math.log(size)) > math.log(ALIKE)
    ]
    return f"linked to the question by the model's trend over {' and '.join(other)}" if other else ""


def _new(belief: Belief, table: pd.DataFrame, at: int, before: Sequence[int]) -> str:
    """What no cell before it has: a teacher's size, a student, a budget, a teacher of another seed."""
    groups, cells = belief.cells.groups, belief.cells
    last = list(before)
    same_rung = [j for j in last if groups["rung"][j] == groups["rung"][at]]
    if not same_rung:
        return "a new teacher size"
    if not any(groups["teacher"][j] == groups["teacher"][at] for j in same_rung):
        seeds = len({int(groups["teacher"][j]) for j in same_rung}) + 1
        return f"trained teacher number {seeds} of this size, which separates size from teacher-seed variance"
    if not any(abs(cells.student[j] - cells.student[at]) <= SAME for j in last):
        return "a new student"
    if not any(abs(cells.data[j] - cells.data[at]) <= SAME for j in last):
        return "a new budget"
    repeated = [j for j in same_rung if cells.curve[j] == cells.curve[at] and _trained(groups, j, at)]
    return "another seed of a student and teacher that were run" if repeated else ""


def _trained(groups: Mapping[str, np.ndarray], i: int, j: int) -> bool:
    return bool(groups["teacher"][i] == groups["teacher"][j])


def _teacher(bills: Bills, i: int, began: np.ndarray, paid: np.ndarray) -> str:
    """Whether its teacher was there before (`began`), is trained for a cell before it (`paid`), or for this one."""
    shared = [int(p) for p in bills.needs[i] if p < len(bills.keys) and _kind(bills, int(p)) == "teacher"]
    if not shared:
        return ""
    if all(began[shared] | (bills.parts[shared] == 0)):  # a store may have a teacher that no cell was run with
        return "its teacher is already trained"
    return "its teacher is trained for a cell above" if all(paid[shared]) else "its teacher must be trained"


def _kind(bills: Bills, part: int) -> str:
    key = bills.keys[part]
    return str(key[0]) if isinstance(key, tuple) and key else str(key)
