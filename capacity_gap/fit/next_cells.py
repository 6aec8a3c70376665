"""`next_cells`: which cells of a pool to run next, by how much of a goal's variance they remove per FLOP.

The joint model (`next_model.py`) gives each cell's information; costs count shared stages once
(`records/bills.py`); `next_search.py` combines the two. A law first needs three students under four teachers.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from capacity_gap.fit.joint import SAME, close_names
from capacity_gap.fit.joint_fit import check_alike
from capacity_gap.fit.next_model import Belief, Goal, believe
from capacity_gap.fit.next_reasons import reasons
from capacity_gap.fit.next_search import LEAST_STUDENTS, LEAST_TEACHERS, Pairs, Search, core
from capacity_gap.records.bills import Arithmetic, Bills, Cost
from capacity_gap.records.candidate import Candidate
from capacity_gap.records.columns import default_metric, require
from capacity_gap.records.tables import numbers

SIZES = ("student_params", "teacher_params")


class BudgetTooSmall(ValueError):
    """A budget is too small for a goal. `needed`: the smallest sufficient budget, in its unit, and `for_what` it is."""

    def __init__(self, said: str, needed: float, for_what: str) -> None:
        super().__init__(said)
        self.needed, self.for_what = needed, for_what


CORE = f"{LEAST_STUDENTS} students under {LEAST_TEACHERS} teachers"
NAMES = ("student", "teacher", "seed", "teacher_seed")
PLACE = ("student", "teacher", "data_tokens", "seed", "teacher_seed")  # what tells two cells apart


def next_cells(
    frame: pd.DataFrame, pool: pd.DataFrame, *, goal: Goal | str = "law", k: int = 6, cost: Cost | None = None
) -> list[Candidate]:
    """The k cells of a pool to run next.

    Args:
        frame: tidy records so far, as for `fit_joint`; may be empty. With fewer than three teachers or ten cells, study
            one's noise and curvature and an optimum at 2.5 times the student are assumed.
        pool: candidate cells: `student_params`, `teacher_params`; may have `data_tokens`, `seed`, `teacher_seed` and
            the names `student` and `teacher`. Those that the frame has are left out, and so are those whose teacher is
            no larger than its student, which the model does not fit.
        goal: `Goal`, or "law".
        k: how many.
        cost: FLOPs of a cell's own part and of what it shares, by key; by default 6·N·D and 2·N·D (`Arithmetic`).

    Returns:
        At most k candidates, best first; fewer where the pool has fewer. A goal of "law" first completes three students
        under four teachers.

    Raises:
        ValueError: columns are missing, or the pool has no cell that could be run.
    """
    if k < 1:
        raise ValueError(f"k={k} must be one or more.")
    return _chosen(frame, pool, goal, k, math.inf, cost or Arithmetic())


def within_budget(
    frame: pd.DataFrame,
    pool: pd.DataFrame,
    *,
    goal: Goal | str = "law",
    budget: float,
    cost: Cost | None = None,
) -> list[Candidate]:
    """The part of a pool that narrows a goal most and costs no more than a budget, in the order in which to run it.

    Args:
        frame: tidy records so far; may be empty.
        pool: candidate cells.
        goal: as for `next_cells`.
        budget: FLOPs.
        cost: as for `next_cells`.

    Raises:
        ValueError: as for `next_cells`, or the budget holds no cell, or for a law not three students under four
            teachers.
    """
    if not budget > 0:
        raise ValueError(f"budget={budget} must be above zero FLOPs.")
    cost = cost or Arithmetic()
    found = _chosen(frame, pool, goal, len(pool), budget, cost)
    if not found:
        frame, pool = _tidy(frame, pool)
        bills = Bills.of(pool, cost)
        least = float(bills.each(bills.paid(frame, cost)).min())
        raise BudgetTooSmall(
            f"budget={budget:.3g} FLOPs is too small for any cell of this pool: the cheapest takes {least:.3g}. Raise "
            "it, or add smaller cells.",
            least,
            "the cheapest cell",
        )
    return found


@threadpool_limits.wrap(limits=1)
def _chosen(
    frame: pd.DataFrame, pool: pd.DataFrame, goal: Goal | str, most: int, budget: float, cost: Cost
) -> list[Candidate]:
    goal = Goal(goal) if isinstance(goal, str) else goal
    frame, pool = _tidy(frame, pool)
    belief, bills = believe(frame, pool, goal), Bills.of(pool, cost)
    search = Search.of(belief, bills, bills.paid(frame, cost))
    began = search.paid.copy()
    if goal.kind == "law":
        _first_core(search, _pairs(belief, frame, pool), budget)
    while len(search.chosen) < most:
        more = search.bundle(budget - sum(search.costs))
        if not more:
            break
        for i in more[: most - len(search.chosen)]:
            search.add(i)
    chosen = search.chosen[:most]
    told = reasons(belief, goal, frame, pool, bills, began, chosen)
    cells = pool.to_dict("records")
    return [
        Candidate({str(key): value for key, value in cells[i].items()}, gain, flops, reason, belief.fitted)
        for i, gain, flops, reason in zip(chosen, search.gains, search.costs, told, strict=False)
    ]


def _first_core(search: Search, pairs: Pairs, budget: float) -> None:
    """Chooses what a law lacks of its least grid.

    Raises:
        BudgetTooSmall: the budget does not hold it though the pool does.
    """
    if pairs.enough():
        return
    cells = core(search, pairs, budget)
    if not cells and math.isfinite(budget) and (dear := core(search, pairs)):
        needed = search.bills.total(dear, search.paid)
        raise BudgetTooSmall(
            f"budget={budget:.3g} FLOPs is too small for {CORE}, which a law needs. Set {needed:.3g} or more, or "
            "choose a target (student_params, data_tokens).",
            needed,
            CORE,
        )
    for i in cells:
        search.add(i)


def _pairs(belief: Belief, frame: pd.DataFrame, pool: pd.DataFrame) -> Pairs:
    """Students and teachers as codes."""
    cells, known = belief.cells, belief.known
    names = pd.concat([frame, pool])["student"].astype(str) if "student" in pool else close_names(cells.student)
    students, teachers = pd.factorize(np.asarray(names))[0], cells.groups["rung"]
    run = frozenset(zip(students[:known].tolist(), teachers[:known].tolist(), strict=True))
    rest = [c for c in ("data_tokens", "seed", "teacher_seed") if c in pool]
    codes = pool.groupby(rest, dropna=False, sort=True).ngroup().to_numpy() if rest else np.zeros(len(pool), int)
    return Pairs(students[known:], teachers[known:], codes, run)


def _tidy(frame: pd.DataFrame, pool: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells with a loss and those that could be run, with the same columns.

    Raises:
        ValueError: a column is missing, or nothing is left of the pool.
    """
    require(pool, SIZES)
    pool = numbers(pool, [*SIZES, "data_tokens"]).reset_index(drop=True)
    frame = _losses(frame, pool) if len(frame) else pool.iloc[:0].assign(loss=0.0)
    kept = [c for c in (*NAMES, "data_tokens") if c in pool and c in frame]
    frame, pool = (_labelled(t.drop(columns=_others(t, kept)), kept) for t in (frame, pool))
    new = _larger(pool) & ~_places(pool, kept).isin(set(_places(frame, kept)))
    if not new.any():
        raise ValueError(
            f"none of the pool's {len(pool)} cells can be run: each was run already, or its teacher is not larger "
            "than its student. Add students, teachers, budgets or seeds."
        )
    return frame[_larger(frame)].reset_index(drop=True), pool[new].drop_duplicates(kept).reset_index(drop=True)


def _losses(frame: pd.DataFrame, pool: pd.DataFrame) -> pd.DataFrame:
    """Finished cells of a table with their metric as `loss`."""
    metric = default_metric(frame)
    require(frame, [*SIZES, metric])
    frame = numbers(frame, [*SIZES, metric, "data_tokens"])
    if "status" in frame:
        frame = frame[frame["status"] == "done"]
    if "data_tokens" in frame and "data_tokens" in pool:
        frame = frame[frame["data_tokens"] > 0]
    check_alike(frame)
    return frame.assign(loss=frame[metric]).dropna(subset=["loss"])


def _labelled(table: pd.DataFrame, kept: Sequence[str]) -> pd.DataFrame:
    """Seeds and names as text that is alike in both tables: a column with gaps holds 1.0 for 1."""
    texts = {c: table[c].map(_text).astype(object) for c in NAMES if c in kept}
    tokens = {"data_tokens": table["data_tokens"].astype(float)} if "data_tokens" in kept else {}
    return table.assign(**texts, **tokens)


def _text(value: Any) -> str:
    whole = isinstance(value, float | np.floating) and math.isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)


def _others(table: pd.DataFrame, kept: Sequence[str]) -> list[str]:
    """Names and budgets that only one of two tables has: they cannot be compared."""
    return [c for c in (*NAMES, "data_tokens") if c in table and c not in kept]


def _larger(table: pd.DataFrame) -> pd.Series:
    """Which cells have a teacher larger than its student."""
    return table["teacher_params"] / table["student_params"] > math.exp(SAME)


def _places(table: pd.DataFrame, kept: Sequence[str]) -> pd.Series:
    """The identity of a cell, as text."""
    by = [c for c in PLACE if c in kept]
    by += [f"{of}_params" for of in ("student", "teacher") if of not in kept]
    rows = zip(*(table[c].tolist() for c in by), strict=True)
    return pd.Series([" | ".join(map(str, row)) for row in rows], index=table.index, dtype=object)
