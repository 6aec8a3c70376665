"""The registered analysis of the sweeps `replicate_*` (docs/replicate_registration.md), of records alone.

    python -m benchmarks.replicate answers RECORDS...    one row for each origin, and all of them together

RECORDS are stores, folders of CSV files or CSV files, as `records import` writes them. Rows without an origin are told
apart by where they were read from. The analysis was fixed, and run on simulated cells
(`benchmarks/replicate_power.py`), before any cell.
"""

import argparse
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.study2_answers import FITTED, plain
from benchmarks.study_tables import markdown
from capacity_gap import records
from capacity_gap.estimators.mixed import Contrast
from capacity_gap.fit import JointFit, fit_joint
from capacity_gap.fit.joint_fit import BreakEven
from capacity_gap.records.columns import BY
from capacity_gap.settings.scales import short_scale

LEVEL = 0.05  # two-sided, of the tests of questions 1 and 3
ALL = "all origins"
PAIRS = (("10m", "50m"), ("0.6b", "4b"), ("160m", "1.4b"))  # of `small`, Qwen3, Pythia: the teachers of question 1
OPTIMUM = {"law": "yes", "provisional": "only provisional", "break_even": "only a break-even", "no_optimum": "no"}


@dataclass(frozen=True)
class Answers:
    """What one set of cells says."""

    fit: JointFit

    @property
    def break_even(self) -> str:
        """Question 1, at the mean student."""
        if not self.fit.budgets[1:]:
            return "open"
        if self.at.established:
            return "yes"
        first, last = (self.larger_less_smaller(tokens) for tokens in (self.fit.budgets[0], self.fit.budgets[-1]))
        if first.p() < LEVEL and last.p() < LEVEL and (first.value > 0) == (last.value > 0):
            return "no, the larger is better" if last.value < 0 else "no, the smaller is better"
        return "open"

    @property
    def optimum(self) -> str:
        """Question 2: `yes` by the status law alone."""
        return OPTIMUM[self.fit.status]

    @property
    def growth(self) -> str:
        """Question 3: the slope of loss against log teacher size falls with tokens, so that larger teachers gain."""
        if "d" not in self.fit.curve.terms:
            return "open"
        found = self.change
        return "open" if found.p() >= LEVEL else "it grows" if found.value < 0 else "it shrinks"

    @property
    def change(self) -> Contrast:
        """Of that slope for each unit of log tokens, a teacher's size held: nats."""
        curve = self.fit.curve
        return curve.contrast(curve.unit("d") - curve.centre.d * curve.unit("κ"))

    @property
    def pair(self) -> tuple[str, str]:
        """The small and the large teacher: those of `PAIRS`, else the ends that every student has."""
        rungs = self.fit.curve.rungs
        return next((pair for pair in PAIRS if set(pair) <= set(rungs)), self.fit.curve.shared)

    @property
    def at(self) -> BreakEven:
        """The tokens at which the larger one begins to win."""
        small, large = (math.exp(self.fit.curve.rungs[name]) for name in self.pair)
        return self.fit.break_even(math.exp(self.fit.curve.means[0]), small, large)

    def larger_less_smaller(self, tokens: float | None) -> Contrast:
        """The loss under the larger teacher less that under the smaller, at the mean student and a budget."""
        curve = self.fit.curve
        small, large = (curve.rungs[name] for name in self.pair)
        d = math.log(tokens or 1) - curve.means[1]
        return curve.contrast(curve.difference(small, large, 0.0, pd.Series([d]).to_numpy())[0])

    @property
    def row(self) -> dict[str, str]:
        """The three answers, each with its numbers."""
        fit, row = self.fit, {"1 break-even": self.break_even}
        if fit.budgets[1:]:
            row["tokens (95 %)"] = ranged(self.at.tokens, self.at.interval, short_scale)
            row["teachers"] = " and ".join(self.pair)
        row["2 optimum"] = self.optimum + (f" (rests on {' '.join(fit.rests_on)})" if fit.rests_on else "")
        for tokens in fit.budgets:
            best = fit.ratio_at(tokens)
            at = f" at {short_scale(tokens)}" if tokens else ""
            row[f"best ratio{at}"] = ranged(best.value, best.interval, "{:.2g}".format)
        row["3 with tokens"] = self.growth
        if (d := fit.exponents().get("d")) is not None:
            row["d (95 %)"] = ranged(d.value, d.interval, "{:.2g}".format)
        return row


def ranged(value: float, interval: tuple[float, float], text: Any) -> str:
    """A number with its set; an end that is open is left out."""
    low, high = ("" if not math.isfinite(end) or end == 0 else text(end) for end in interval)
    return f"{text(value) if math.isfinite(value) else 'none'} ({low} to {high})"


def answered(cells: pd.DataFrame) -> Answers:
    """The joint model of these cells alone, which are alike but for student, teacher, budget and seeds."""
    return Answers(fit_joint(cells[list(FITTED)], metric="loss"))


def loaded(places: Sequence[str]) -> pd.DataFrame:
    """The finished, trained cells of all records, each with an origin.

    Raises:
        SystemExit: one origin has two results of one cell.
    """
    frames = []
    for place in places:
        frame = records.load(place)
        frames.append(frame.assign(origin=frame["origin"].fillna(place) if "origin" in frame else place))
    frame = pd.concat(frames, ignore_index=True)
    frame = plain(frame[(frame["status"] == "done") & (frame["data_tokens"] > 0)])
    frame = frame.drop_duplicates(["origin", "cell", "loss"])
    if (twice := frame.duplicated(["origin", "cell"])).any():
        raise SystemExit(
            f"{', '.join(frame.loc[twice, 'origin'].unique())}: two results of one cell. Give one of them."
        )
    return frame.reset_index(drop=True)


def pooled(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of several origins as one grid: a seed of another origin is another seed, and so are its teachers.

    The same weights and order of text on another machine end elsewhere: runs that differ in the last bit differ as much
    as runs of two seeds. Results that agree to the last bit are one. Published teachers are the same everywhere.
    """
    once = cells.drop_duplicates(["cell", "loss"])
    names = once["origin"] + "/"
    here = once["teacher_tokens"].notna() if "teacher_tokens" in once else pd.Series(True, index=once.index)
    return once.assign(
        seed=names + once["seed"].astype(str),
        teacher_seed=(names + once["teacher_seed"].astype(str)).where(here, once["teacher_seed"].astype(str)),
    )


def whole(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of those seeds of each origin that lack none of the grid's students, teachers and budgets."""
    keys = ["student", "teacher", "data_tokens"]
    wanted = len(cells[keys].drop_duplicates())
    counts = cells.drop_duplicates(["origin", "seed", *keys]).groupby(["origin", "seed"]).size()
    full = set(counts.index[counts == wanted])
    return cells[[key in full for key in zip(cells["origin"], cells["seed"], strict=True)]]


def grids(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The cells by what parts curves besides the budget: each grid is a question of its own."""
    keys = [c for c in BY if c in frame and c != "data_tokens" and frame[c].nunique(dropna=False) > 1]
    parts: Iterator[tuple[Hashable, pd.DataFrame]] = iter(
        frame.groupby(keys, dropna=False, sort=False) if keys else [("", frame)]
    )
    for _, cells in parts:
        budgets = ", ".join(short_scale(tokens) for tokens in sorted(cells["data_tokens"].unique()))
        first = cells.iloc[0]
        yield f"{first['family']} on {first['corpus']}, {budgets} tokens", cells


def answers(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each grid a table: a row for each origin, and one of all together if there are several."""
    found = {}
    for name, cells in grids(frame):
        full, rows = whole(cells), []
        each = {str(origin): full[full["origin"] == origin] for origin in sorted(cells["origin"].unique())}
        if len(each) > 1:
            each[ALL] = pooled(full)
        for origin, mine in each.items():
            row = {"origin": origin, "cells": str(len(mine))}
            try:
                rows.append(row | (answered(mine).row if len(mine) else {"1 break-even": "no seed has all cells"}))
            except ValueError as error:
                rows.append(row | {"1 break-even": f"not fitted: {error}"})
        columns = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row)
        found[name] = pd.DataFrame(rows, columns=list(columns)).fillna("")
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers",))
    parser.add_argument("records", nargs="+")
    for name, table in answers(loaded(parser.parse_args(words).records)).items():
        print(f"{name}\n{markdown(list(table), table.to_numpy().tolist())}\n")


if __name__ == "__main__":
    main()
