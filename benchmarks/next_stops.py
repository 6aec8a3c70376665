"""Claim: after rounds end at a narrow interval, the `AFTER_STOPPING` one holds 95 % of true values if the model fits.

    python -m benchmarks.next_stops --tune          coverage by level, from which the level was chosen
    python -m benchmarks.next_stops                 judges in half an hour of two cores; goes on where it was stopped

Rounds like those of `strategy=adaptive`, on the simulated studies of `benchmarks/next_cells.py`: six cells a round,
from 60 on a tenth, and no end by a small gain. The answer is that of `capacity_gap.fit.goal_answer`. They end where two
answers in a row are at most `until` times as high as low; paths that spend `MOST` of the full grid's FLOPs before that
have not stopped. The level is the least of `LEVELS` that covers 95 % at until=3 on seeds below 2,000, over laws and
targets on the surfaces that the joint model fits. Seeds from 20,000 judge it, and break-even budgets, which were added
after the level was chosen.

`stopped`: the share of paths that stopped, `stops` of them. Of these: `share`, the median share of the full grid's
FLOPs; `covers_95` and `covers_stopped`, how often the 95 % interval and that of `AFTER_STOPPING` hold the true value;
`open`, how often the latter is open at an end; `closed`, how many are not, and how many of those hold.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.next_cells import COSTS, MODES, Study, flops, greedy, jobs_of, options, run, study_of
from capacity_gap.fit.goal_answer import AFTER_STOPPING, answer, answers, narrow_enough
from capacity_gap.fit.next_model import Goal
from capacity_gap.fit.regression import Estimate
from capacity_gap.records.bills import Bills

LEVELS = (0.95, 0.98, 0.99, 0.995)
UNTIL = (2.0, 3.0, 5.0)
STUDIES = 50
MOST = 0.75
FITTED = ("joint", "steep")  # surfaces that the joint model can follow
COLUMNS = ["surface", "seed", "goal", "mode", "until", "share", "cells", "level", "holds", "open"]


def one(name: str, seed: int) -> list[dict[str, Any]]:
    """Where rounds for each goal stop on one study, and whether the intervals then hold the true value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study, _ = study_of(name, seed)
        found = []
        for mode, goal in itertools.product(MODES, [*study.goals.values(), *_break_even(study)]):
            about = {"surface": name, "seed": seed, "goal": goal.kind, "mode": mode}
            found += [about | row for row in _path(study, goal, mode)]
        return found


def _break_even(study: Study) -> Iterator[Goal]:
    """Of the middle student under the third teacher and the largest with which there is such a budget, if any."""
    assert study.surface
    size, (small, *larger) = math.exp(study.means[0]), study.surface.teachers[2:].tolist()
    goals = (Goal("break_even", size, small=small, large=large) for large in reversed(larger))
    yield from itertools.islice((g for g in goals if math.isfinite(study.surface.break_even(g))), 1)


def _path(study: Study, goal: Goal, mode: str) -> Iterator[dict[str, Any]]:
    bills = Bills.of(study.table, COSTS[mode])
    whole = flops(bills, range(len(study.table)))
    chosen: list[int] = []
    left, before = list(UNTIL), None
    for more in greedy(study, goal, COSTS[mode]):
        chosen += more
        share = flops(bills, chosen) / whole
        if not left or share > MOST:
            break
        frame = study.table.iloc[chosen].reset_index(drop=True)
        now = answer(frame, goal)
        for until in [u for u in left if narrow_enough(now, u) and narrow_enough(before, u)]:
            left.remove(until)
            for level, found in answers(frame, goal, LEVELS).items():
                row = {"until": until, "share": share, "cells": len(chosen), "level": level}
                yield row | _held(found, _true(study, goal, frame))
        before = now
    yield from ({"until": until} for until in left)


def _held(found: Estimate, true: float) -> dict[str, bool]:
    low, high = found.interval
    return {"holds": low <= true <= high, "open": not (low > 0 and math.isfinite(high))}


def _true(study: Study, goal: Goal, frame: pd.DataFrame) -> float:
    """The true answer: of a law at the mean (log) student and budget of the cells that were run."""
    assert study.surface
    if goal.kind == "break_even":
        return study.surface.break_even(goal)
    if goal.kind == "law":
        n, d = (float(np.log(frame[c]).mean()) for c in ("student_params", "data_tokens"))
        return math.exp(study.surface.best(n, d) - n)
    return math.exp(study.surface.best(*study.at(goal)))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """A row for each surface, goal and `until`."""
    rows = []
    for (surface, goal, until), part in found.groupby(["surface", "goal", "until"]):
        paths = part.drop_duplicates(["seed", "mode"])
        nominal, wide = (part[part["level"].eq(level)] for level in (LEVELS[0], AFTER_STOPPING))
        row = {"surface": surface, "goal": goal, "until": until, "studies": part["seed"].nunique()}
        row |= {"stopped": paths["share"].notna().mean(), "share": paths["share"].median()}
        row |= {"cells": paths["cells"].median(), "covers_95": nominal["holds"].mean()}
        closed = wide[wide["open"].eq(0)]
        row |= {"covers_stopped": wide["holds"].mean(), "open": wide["open"].mean()}
        rows.append(row | {"stops": len(wide), "closed": len(closed), "closed_hold": int(closed["holds"].sum())})
    return pd.DataFrame(rows)


def by_level(found: pd.DataFrame) -> pd.DataFrame:
    """Coverage of each level at until=3, of laws and targets over the surfaces that the model fits."""
    chooses = found["surface"].isin(FITTED) & found["until"].eq(3.0) & found["goal"].isin(["law", "target"])
    mine = found[chooses].dropna(subset="level")
    return mine.groupby("level")["holds"].agg(stops="size", covers="mean").reset_index()


def main(words: Sequence[str] | None = None) -> int:
    given = options(__doc__, STUDIES).parse_args(words)
    part = given.work / f"stops_{'tune' if given.tune else 'judge'}.csv"
    found = run(jobs_of(given), part, given.workers, one, COLUMNS).astype({"holds": float, "open": float})
    table = by_level(found) if given.tune else summary(found)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
