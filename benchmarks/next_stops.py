"""Claim: how often intervals hold the true value once the rounds of `strategy=adaptive` have ended, by why they ended.

    python -m benchmarks.next_stops --tune          coverage by rule, from which the rule was chosen
    python -m benchmarks.next_stops                 judges in half an hour of two cores; goes on where it was stopped
    python -m benchmarks.next_stops --page          writes the table of docs/next.md from results/next_stops.csv

Rounds choose and end by the product's own rules: cells by `next_cells`, `next.k` a round, answers and ends by
`capacity_gap.fit.goal_answer`. Two things differ. Cells cost FLOPs, not seconds, and at a budget the last round, of
which the product runs the part that fits, is left out. They run on the simulated studies of `benchmarks/next_cells.py`,
whose grid is the pool. Besides its goals there are two break-even budgets of the middle student: one that there is,
and, as `no_break_even`, a pair of which one teacher wins at all budgets of the grid. That one's true value is taken as
infinite or zero: only an interval that is open at that end holds it.

Rounds end where the interval is `narrow`, where the `gain` is too small, or at a `budget`: a share of the full grid's
FLOPs that the next round would exceed. `until` and `budget` are what the rounds were told; where there is no `budget`,
paths that spend `MOST` are ended too. The rule for narrow ends was chosen on seeds below 2,000 and `FITTED` surfaces
(`by_rule`, `chosen`). Seeds from 30,000, which chose nothing, judge it once.

Of the `ends` of a kind among `paths`: `share`, the median share of the full grid's FLOPs, and `cells`; `known`, at how
many there is an answer at all; `holds_95`, how many 95 % intervals hold the true value; `holds`, how many of those that
are reported, which after a narrow end are of the level `AFTER_STOPPING`; `closed`, how many of these have two ends, and
`closed_holds`, how many of those hold it. `path_share`, of a rule: the mean share of all paths, wherever they end.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.next_cells import COSTS, MODES, Study, flops, jobs_of, options, run, study_of
from benchmarks.study import filled
from capacity_gap.cell.strategy_config import NextConfig
from capacity_gap.fit.goal_answer import AFTER_STOPPING, LEAST_CELLS, answers, narrow_twice, too_little
from capacity_gap.fit.next_cells import next_cells
from capacity_gap.fit.next_model import Goal
from capacity_gap.fit.regression import Estimate
from capacity_gap.records.bills import Bills
from capacity_gap.settings.places import RESULTS

FIRST_SEED = 30_000
LEVELS = (0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
LEAST = (0, 24, 36, 48, 60, 72, 84)  # cells before rounds may end at a narrow interval
UNTIL = (2.0, 3.0, 5.0)
RULED = 3.0  # the `until` for which the rule was chosen, and that of the page
BUDGETS = (0.1, 0.3)
STUDIES = 100
PAGE = RESULTS.parent / "docs" / "next.md"
MOST = 0.75
FITTED = ("joint", "steep")  # surfaces that the joint model can follow
PATH = ["surface", "seed", "goal", "mode"]
COLUMNS = [*PATH, "round", "share", "cells", "gain", "true", "level", "low", "high"]


def one(name: str, seed: int) -> list[dict[str, Any]]:
    """All rounds for each goal on one study: a row for each level of the answer before a round, one if there is none"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study, _ = study_of(name, seed)
        found = []
        for mode, (kind, goal) in itertools.product(MODES, [*study.goals.items(), *_break_even(study)]):
            about = {"surface": name, "seed": seed, "goal": kind, "mode": mode}
            found += [about | row for row in _rounds(study, goal, mode)]
        return found


def _break_even(study: Study) -> Iterator[tuple[str, Goal]]:
    """Of the middle student under the third teacher: the largest with which there is such a budget, and without."""
    assert study.surface
    size, (small, *larger) = math.exp(study.means[0]), study.surface.teachers[2:].tolist()
    goals = [Goal("break_even", size, small=small, large=large) for large in reversed(larger)]
    there = [math.isfinite(study.surface.break_even(goal)) for goal in goals]
    for kind, wanted in (("break_even", True), ("no_break_even", False)):
        if wanted in there:
            yield kind, goals[there.index(wanted)]


def _rounds(study: Study, goal: Goal, mode: str) -> Iterator[dict[str, Any]]:
    bills = Bills.of(study.table, COSTS[mode])
    whole = flops(bills, range(len(study.table)))
    table = study.table.assign(index=np.arange(len(study.table)))
    chosen: list[int] = []
    for number in itertools.count():
        there = table["index"].isin(chosen)
        frame, pool = study.table.iloc[chosen].reset_index(drop=True), table[~there].drop(columns="loss")
        found = next_cells(table[there], pool, goal=goal, k=NextConfig().k, cost=COSTS[mode]) if len(pool) else []
        now, gain = answers(frame, goal, LEVELS) if chosen else {}, sum(c.gain for c in found)
        share = flops(bills, chosen) / whole if chosen else 0.0
        about = {"round": number, "share": share, "cells": len(chosen), "gain": gain}
        about |= {"true": _true(study, goal, frame) if chosen else math.nan}
        ends = ({"level": level, "low": a.interval[0], "high": a.interval[1]} for level, a in now.items())
        yield from (about | end for end in (ends if now else [{}]))
        if not found or share > MOST or too_little(gain, now.get(LEVELS[0])):
            return
        chosen += [int(c.cell["index"]) for c in found]


def _true(study: Study, goal: Goal, frame: pd.DataFrame) -> float:
    """The true answer: of a law at the mean (log) student and budget of the cells that were run."""
    assert study.surface
    if goal.kind == "break_even":
        found = study.surface.break_even(goal)
        return found if math.isfinite(found) else _without(study, goal)
    if goal.kind == "law":
        n, d = (float(np.log(frame[c]).mean()) for c in ("student_params", "data_tokens"))
        return math.exp(study.surface.best(n, d) - n)
    return math.exp(study.surface.best(*study.at(goal)))


def _without(study: Study, goal: Goal) -> float:
    """Zero where the larger teacher wins at all budgets of a grid, infinity where the smaller one does."""
    assert study.surface and goal.student_params and goal.small and goal.large
    n, d = np.log([goal.student_params]), np.log(study.surface.budgets[:1])
    small, large = (study.surface.loss(np.log([size]), n, d)[0] for size in (goal.small, goal.large))
    return 0.0 if large < small else math.inf


@dataclass(frozen=True, eq=False)
class Look:
    """What is known before a round."""

    number: int
    share: float
    cells: int
    gain: float
    true: float
    found: Mapping[float, tuple[float, float]]  # the interval of each level

    @property
    def answer(self) -> Estimate | None:
        """At the level at which rounds look; its value is of no account."""
        return Estimate(1.0, self.found[LEVELS[0]]) if self.found else None

    def holds(self, level: float) -> bool:
        """Whether the true value is known to lie where it does."""
        return level in self.found and self.found[level][0] <= self.true <= self.found[level][1]

    def closed(self, level: float) -> bool:
        """Whether the interval has two ends."""
        return level in self.found and self.found[level][0] > 0 and math.isfinite(self.found[level][1])


Paths = Mapping[tuple[Any, ...], Sequence[Look]]


def paths_of(rows: pd.DataFrame) -> Paths:
    """The looks of each path, by surface, seed, goal and mode."""
    paths: dict[tuple[Any, ...], list[Look]] = {}
    for _, part in rows.groupby([*PATH, "round"]):
        first, told = part.iloc[0], part.dropna(subset="level")
        ends = zip(told["low"].tolist(), told["high"].tolist(), strict=True)
        found = dict(zip(told["level"].tolist(), ends, strict=True))
        look = Look(*(first[c] for c in ("round", "share", "cells", "gain", "true")), found)
        paths.setdefault(tuple(first[PATH]), []).append(look)
    return paths


def end(path: Sequence[Look], until: float | None, budget: float = MOST, least: int = LEAST_CELLS) -> tuple[str, Look]:
    """Why and where rounds end."""
    for before, now in itertools.pairwise([None, *path]):
        assert now
        if narrow_twice(before.answer if before else None, now.answer, now.cells, until, least=least):
            return "narrow", now
        if now.share > budget:
            return "budget", before or now
    last = path[-1]
    return ("gain" if too_little(last.gain, last.answer) else "budget"), last


def summary(paths: Paths) -> pd.DataFrame:
    """A row for each surface, goal, instruction and kind of end."""
    told = [(until, None) for until in UNTIL] + [(None, budget) for budget in BUDGETS]
    rows = []
    for surface, goal in dict.fromkeys((key[0], key[2]) for key in paths):
        mine = [path for key, path in paths.items() if (key[0], key[2]) == (surface, goal)]
        for until, budget in told:
            ends = [end(path, until, budget or MOST) for path in mine]
            for kind in sorted({kind for kind, _ in ends}):
                about = {"surface": surface, "goal": goal, "until": until, "budget": budget, "end": kind}
                looks = [look for why, look in ends if why == kind]
                rows.append(about | {"paths": len(mine)} | _counts(looks, AFTER_STOPPING if kind == "narrow" else 0.95))
    return pd.DataFrame(rows)


def _counts(looks: Sequence[Look], level: float) -> dict[str, Any]:
    closed = [look for look in looks if look.closed(level)]
    return {
        "ends": len(looks),
        "known": sum(bool(look.found) for look in looks),
        "share": float(np.median([look.share for look in looks])),
        "cells": float(np.median([look.cells for look in looks])),
        "holds_95": sum(look.holds(LEVELS[0]) for look in looks),
        "holds": sum(look.holds(level) for look in looks),
        "closed": len(closed),
        "closed_holds": sum(look.holds(level) for look in closed),
    }


def by_rule(paths: Paths) -> pd.DataFrame:
    """What each number of cells and each level would do at until=3: laws and targets on surfaces that the model fits"""
    mine = {key: path for key, path in paths.items() if key[0] in FITTED and key[2] in ("law", "target")}
    rows = []
    for least in LEAST:
        ended = [end(path, RULED, least=least) for path in mine.values()]
        looks = [look for why, look in ended if why == "narrow"]
        about = {"studies": len({key[1] for key in mine}), "least_cells": least, "paths": len(mine)}
        about |= {"path_share": float(np.mean([look.share for _, look in ended]))}
        rows += [about | {"level": level} | _counts(looks, level) for level in LEVELS]
    return pd.DataFrame(rows)


def chosen(rules: pd.DataFrame) -> tuple[int, float]:
    """Cells and level: the fewest FLOPs, then the lowest level, that hold 95 % of all and 90 % of closed ones."""
    good = rules[(rules["holds"] >= 0.95 * rules["ends"]) & (rules["closed_holds"] >= 0.9 * rules["closed"])]
    first = good.sort_values(["path_share", "level"]).iloc[0]
    return int(first["least_cells"]), float(first["level"])


GOALS = {"law": "law", "target": "target", "break_even": "break-even", "no_break_even": "break-even, none there"}
NAMES = {"joint": "study one", "steep": "steep", "published": "published law"}


def page_table(table: pd.DataFrame) -> str:
    """A summary's rows of `until=3`, as the page shows them."""
    level = f"{100 * AFTER_STOPPING:g} %"
    head = ["goal, surface", "narrow end", "FLOPs", "its 95 %", f"its {level}", f"closed {level}"]
    lines = [[*head, "small gain", "its 95 %", "closed 95 %"], ["---"] * 9]
    mine = table[table["until"].eq(RULED)]
    for goal, surface in itertools.product(GOALS, NAMES):
        part = mine[mine["goal"].eq(goal) & mine["surface"].eq(surface)].set_index("end")
        if part.empty:
            continue
        cells = [f"{GOALS[goal]}, {NAMES[surface]}"]
        for kind, shown in (("narrow", ("holds_95", "holds", "closed_holds")), ("gain", ("holds_95", "closed_holds"))):
            found = part.loc[kind] if kind in part.index else None
            cells.append(f"{0 if found is None else found['ends']:.0f} of {part['paths'].iloc[0]}")
            cells += ["–" if found is None else f"{found['share']:.0%}"] * (kind == "narrow")
            cells += ["–" if found is None else _of(found, name) for name in shown]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of(found: pd.Series, name: str) -> str:
    """A count and of how many."""
    return f"{found[name]:.0f} of {found['closed' if name == 'closed_holds' else 'known']:.0f}"


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, STUDIES)
    parser.add_argument("--page", action="store_true", help="write the page's table")
    given = parser.parse_args(words)
    if given.page:
        told = {"stops": page_table(pd.read_csv(RESULTS / "next_stops.csv"))}
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")
        return 0
    part = given.work / f"stops_{'tune' if given.tune else 'judge'}.csv"
    paths = paths_of(run(jobs_of(given, FIRST_SEED), part, given.workers, one, COLUMNS))
    table = by_rule(paths) if given.tune else summary(paths)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    if given.tune:
        print("chosen: at least {} cells, and the level {}".format(*chosen(table)))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
