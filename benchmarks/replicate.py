"""The registered analysis of the sweeps `replicate_*` (docs/replicate_registration.md), of records alone.

    python -m benchmarks.replicate answers RECORDS...    one row for each origin, and all of them together

RECORDS are stores, folders of CSV files or CSV files, as `records import` writes them. Rows without an origin are told
apart by where they were read from. The analysis was fixed, and run on simulated cells
(`benchmarks/replicate_power.py`), before any cell. A cell is of a registered sweep if its digest is.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
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
from capacity_gap.runner.claimed_grid import claimed_cells
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.intervals import marks

AXES = ["student", "teacher", "data_tokens"]  # of a grid that is not registered: what a complete seed has
NAMING = ("family", "corpus")  # what the name of a grid opens with
LEVEL = 0.05  # two-sided, of the tests of questions 1 and 3
ALL = "all origins"
PAIRS = (("10m", "50m"), ("0.6b", "4b"), ("160m", "1.4b"))  # of `small`, Qwen3, Pythia: the teachers of question 1
EMBEDDED = "corpus=embedded family.teacher_data=4m data=1m,4m train.batch_size=8 family.pretrain.batch_size=8"  # no hub
REGISTERED = {  # the name of a grid → its family, and the words of its command
    "replicate_hour": ("small", "+sweeps=replicate_hour"),
    "replicate_day": ("small", "+sweeps=replicate_day"),
    "replicate_hour without the hub": ("small", f"+sweeps=replicate_hour {EMBEDDED}"),
    "replicate_qwen3": ("qwen3", "+sweeps=replicate_qwen3"),
    "replicate_pythia": ("pythia", "+sweeps=replicate_pythia"),
}
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
            row["d (95 %)"] = ranged(d.value, d.interval, "{:.2g}".format, least=-math.inf)
        return row


def ranged(value: float, interval: tuple[float, float], text: Any, *, least: float = 0.0) -> str:
    """A number with its set: `2.1 (1.8 to 2.5)`, and `2.1 (≥ 1.8)` or `2.1 (≤ 2.5)` where an end is open."""
    return f"{text(value) if math.isfinite(value) else 'none'} ({marks(interval, text, least=least)})"


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


def registered(name: str) -> pd.DataFrame:
    """The cells of a registered sweep, as this checkout composes it: `cell` and `seed`."""
    claims = claimed_cells(REGISTERED[name][1].split())
    return pd.DataFrame({"cell": list(claims), "seed": [str(claim.columns["seed"]) for claim in claims.values()]})


@dataclass(frozen=True)
class Grid:
    """Cells that answer the same questions, and those that must be there.

    `wanted`: how many cells a complete seed has, by seed. `registered`: its name, or None for any other grid.
    """

    cells: pd.DataFrame
    wanted: Mapping[str, int]
    registered: str | None = None

    @property
    def of_complete_seeds(self) -> pd.DataFrame:
        """The cells of those seeds of each origin that lack none."""
        axes = ["cell"] if self.registered else AXES
        counts = self.cells.drop_duplicates(["origin", "seed", *axes]).groupby(["origin", "seed"]).size()
        full = {(origin, seed) for (origin, seed), count in counts.items() if count == self.wanted.get(str(seed))}
        return self.cells[[key in full for key in zip(self.cells["origin"], self.cells["seed"], strict=True)]]

    def counted(self, used: int, origins: int) -> str:
        """How many of its cells a row rests on."""
        if not self.registered:
            return f"{used} cells, no registered grid"
        asked = f"{sum(self.wanted.values())}"
        return f"{used} of {f'{origins} × ' if origins > 1 else ''}{asked} registered cells"


def grids(frame: pd.DataFrame) -> Iterator[tuple[str, Grid]]:
    """The registered sweeps by the digests of their cells, then all other cells by what parts curves.

    Budgets do not part a grid: how the best teacher moves with them is one of the questions.
    """
    keys = [c for c in BY if c in frame and c != "data_tokens" and frame[c].nunique(dropna=False) > 1]
    rest = frame.assign(seed=frame["seed"].astype(str))
    for name, (family, _) in REGISTERED.items():
        if family not in set(rest["family"]):
            continue  # composing a sweep takes seconds
        known = registered(name)
        here = rest["cell"].isin(known["cell"])
        if here.any():
            rest.loc[here, "seed"] = rest.loc[here, "cell"].map(known.set_index("cell")["seed"])
            wanted = {str(seed): int(count) for seed, count in known.groupby("seed").size().items()}
            yield f"{name}: {_budgets(rest[here])}", Grid(rest[here], wanted, name)
        rest = rest[~here]
    parts = rest.groupby(keys, dropna=False, sort=False) if keys else [((), rest)] if len(rest) else []
    for values, cells in parts:
        first = cells.iloc[0]
        parting = [f"{k}={'none' if pd.isna(v) else v}" for k, v in zip(keys, values, strict=True) if k not in NAMING]
        said = ", ".join([f"{first['family']} on {first['corpus']}", _budgets(cells), *parting])
        yield said, Grid(cells, dict.fromkeys(cells["seed"].unique(), len(cells[AXES].drop_duplicates())))


def _budgets(cells: pd.DataFrame) -> str:
    return f"{', '.join(short_scale(tokens) for tokens in sorted(cells['data_tokens'].unique()))} tokens"


def answers(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each grid a table: a row for each origin, and one of all together if there are several."""
    found: dict[str, pd.DataFrame] = {}
    for name, grid in grids(frame):
        alike = sum(known == name or known.startswith(f"{name} (grid ") for known in found)
        found[f"{name} (grid {alike + 1})" if alike else name] = _table(grid)
    return found


def _table(grid: Grid) -> pd.DataFrame:
    full, origins = grid.of_complete_seeds, sorted(map(str, grid.cells["origin"].unique()))
    used = {origin: full[full["origin"] == origin] for origin in origins}
    used |= {ALL: pooled(full)} if len(origins) > 1 else {}
    rows = []
    for origin, mine in used.items():
        several = len(origins) if origin == ALL else 1
        sent = grid.cells if origin == ALL else grid.cells[grid.cells["origin"] == origin]
        kept = full if origin == ALL else mine
        row = {"origin": origin, "cells": grid.counted(len(mine), several)}
        row["left out with their seeds"] = str(len(sent) - len(kept))
        try:
            rows.append(row | (answered(mine).row if len(mine) else {"1 break-even": "no seed has all cells"}))
        except ValueError as error:
            rows.append(row | {"1 break-even": f"not fitted: {error}"})
    columns = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row)
    return pd.DataFrame(rows, columns=list(columns)).fillna("")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers",))
    parser.add_argument("records", nargs="+")
    for name, table in answers(loaded(parser.parse_args(words).records)).items():
        print(f"{name}\n{markdown(list(table), table.to_numpy().tolist())}\n")


if __name__ == "__main__":
    main()
