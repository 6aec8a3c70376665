"""Claim: sets of `fit_joint` cover, nothing is claimed where there is nothing, and real noise leaves power.

    python -m benchmarks.joint_coverage [--out results/joint_coverage.csv]    40 minutes on two cores

Designs are fixed here, before any result. Seeds below 2,000 chose the priors and thresholds of `fit/joint.py`; seeds
from 20,000 on judge: 2,000 grids of each null and each design whose power is claimed, 500 of the others. Students and
teachers are those of study one (students of 40k to 110k, teachers from 55k to 900k, each larger than its student).
`STUDY` is its noise as the model itself reads it in `results/pico`: a trained teacher 16 mnats, a rung's misfit 8, a
teacher with a student 6, a teacher at a budget 7, a run 10. Curvature is study one's, 0.0225 per squared log unit.

`coverage` is that of the set for the best teacher of the mean student at the mean budget, `given` of those with a
claim. `claims` are grids whose status is `law` or `provisional`; for break-even designs `break_even_claims` are those
where it is established. `width` is the median width in log units over that of an oracle's sets of the same grids; sets
that are open count as infinite, `open` and `oracle_open` are their shares, and `width_bounded` is the median ratio of
the grids where neither is. The oracle is given the noise and how the optimum depends on student and budget, and
estimates each curve's level and one slope, curvature and cubic term. Bounds are Clopper and Pearson's, 95 %.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.estimators.mixed import Coefficients
from capacity_gap.fit.joint import ALPHA, Cells, cells_of, ends, fit_cells
from capacity_gap.fit.joint_curve import Centre, JointCurve, Set

FIRST_SEED = 20_000
STUDENTS = np.log(np.array([40e3, 55e3, 80e3, 110e3]))
TEACHERS = np.log(np.array([55e3, 900e3]))
LARGE, SMALL = math.log(900e3), math.log(120e3)
CURVATURE = 0.0225  # nats per squared unit of log teacher size


@dataclass(frozen=True)
class Noise:
    """Standard deviations in nats."""

    teacher: float = 0.0
    rung: float = 0.0
    with_student: float = 0.0
    at_budget: float = 0.0
    run: float = 0.004


STUDY = Noise(0.016, 0.008, 0.006, 0.007, 0.010)


@dataclass(frozen=True)
class Design:
    """One kind of grid. `best` is the true ratio at the first budget, and grows as budget^`d`; None: no optimum."""

    name: str
    noise: Noise = STUDY
    best: float | None = 2.7
    curvature: float = CURVATURE
    cubic: float = 0.0
    steepness: float = 0.0  # of a form that rises exponentially on one side, linearly on the other
    slope: float = 0.0  # of a loss without an optimum
    fade: float = 0.0  # its change per unit of log budget
    plateau: float = 0.0  # falls (below zero) or rises exponentially from a plateau
    bad: int | None = None  # a rung that is 0.05 nats worse than the rest
    d: float = 0.0
    budgets: tuple[float, ...] = (1.0,)
    students: int = 4
    rungs: int = 8
    seeds: int = 3
    noisy_budget: float = 1.0  # what all noise is multiplied by at the first budget
    headline: bool = False  # whether its power is claimed

    @property
    def n(self) -> np.ndarray:
        """log N_S."""
        return STUDENTS if self.students == 4 else np.linspace(math.log(40e3), math.log(130e3), self.students)

    def loss(self, x: np.ndarray, n: np.ndarray, budget: np.ndarray) -> np.ndarray:
        """What depends on the teacher, without noise."""
        if self.best is None:
            centred = x - TEACHERS.mean()
            side = np.sign(self.plateau)
            form = 0.03 * np.exp(2 * side * (x - n - (1.5 if side > 0 else 0.5))) if self.plateau else 0.0
            return (self.slope + self.fade * np.log(budget)) * centred + form
        z = x - n - math.log(self.best) - self.d * np.log(budget)
        if self.steepness:
            s = self.steepness
            return 2 * self.curvature / s**2 * (np.exp(s * z) - s * z - 1)
        return self.curvature * z**2 + self.cubic * z**3

    def table(self, rng: np.random.Generator) -> pd.DataFrame:
        """The cells of one grid."""
        x = np.linspace(*TEACHERS, self.rungs)
        cells = [
            (i, j, k, s)
            for i, n in enumerate(self.n)
            for j in range(len(self.budgets))
            for k in range(self.rungs)
            if x[k] > n + 0.05
            for s in range(self.seeds)
        ]
        i, j, k, s = np.array(cells).T
        shape, noise = (self.rungs, self.seeds), self.noise
        budgets = np.array(self.budgets)
        scatter = noise.teacher * rng.standard_normal(shape)[k, s] + noise.rung * rng.standard_normal(self.rungs)[k]
        scatter += noise.with_student * rng.standard_normal((*shape, self.students))[k, s, i]
        scatter += noise.at_budget * rng.standard_normal((*shape, len(budgets)))[k, s, j]
        scatter += noise.run * rng.standard_normal(len(i))
        scatter *= np.where(j == 0, self.noisy_budget, 1.0)
        loss = 3 - 0.3 * (self.n[i] - self.n.mean()) - 0.1 * np.log(budgets[j]) + scatter
        loss += self.loss(x[k], self.n[i], budgets[j]) + (0.05 * (k == self.bad) if self.bad is not None else 0.0)
        sizes = {"student_params": np.exp(self.n[i]), "teacher_params": np.exp(x[k])}
        return pd.DataFrame({**sizes, "data_tokens": 3e5 * budgets[j], "seed": s, "teacher_seed": s, "loss": loss})

    @property
    def grids(self) -> int:
        """How many judge it."""
        return 2000 if self.headline or self.best is None else 500

    def oracle(self, cells: Cells) -> Set:
        """The set for the best teacher, off the true one, by who knows the noise; a level, slope, curvature, cubic."""
        j = np.unique(cells.data, return_inverse=True)[1]
        z = cells.teacher - cells.student - math.log(self.best or 2.7) - self.d * np.log(np.array(self.budgets)[j])
        levels = np.eye(int(cells.curve.max()) + 1)[cells.curve]
        X = np.column_stack([levels, z, z**2 / 2, z**3 / 6])
        noise, V = self.noise, self.noise.run**2 * np.eye(len(z))
        parts = {"teacher": noise.teacher, "rung": noise.rung, "teacher x student": noise.with_student}
        for name, sd in {**parts, "teacher x budget": noise.at_budget}.items():
            V += sd**2 * np.equal.outer(cells.groups[name], cells.groups[name])
        weighted = np.linalg.solve(V, X)
        covariance = np.linalg.inv(X.T @ weighted)
        none = np.zeros((1, X.shape[1], X.shape[1]))  # no doubt about the noise: normal quantiles
        found = Coefficients(covariance @ weighted.T @ cells.y, covariance, none, np.zeros((1, 1))).of(slice(-3, None))
        span, zero = (float(z.min()), float(z.max())), (0.0, 0.0)
        here = Centre(0, 0, 0)
        curve = JointCurve(here, zero, ("1",), (2, 3), found, span, zero, zero, {}, np.empty(0), none[0], 0.0, ("", ""))
        return curve.optimum(0.0, 0.0)


QUIET = Noise()
TWO, FOUR = (1.0, 4.0), (0.5, 1.0, 2.0, 4.0)
DESIGNS = (
    *(Design(f"cubic {c:+.3f}, little noise", QUIET, curvature=0.02, cubic=c) for c in (-0.008, -0.004, -0.002)),
    *(Design(f"cubic {c:+.3f}, little noise", QUIET, curvature=0.02, cubic=c) for c in (0.0, 0.002, 0.004, 0.008)),
    *(Design(f"cubic {c:+.3f}, 12 rungs", replace(STUDY), cubic=c, rungs=12) for c in (-0.008, 0.0, 0.008)),
    Design("steeper to the right", steepness=1.0, rungs=12),
    Design("steeper to the left", steepness=-1.0, rungs=12),
    Design("study one: 8 rungs, 3 seeds", headline=True),
    Design("24 rungs, 1 seed", rungs=24, seeds=1, headline=True),
    Design("8 students, 10 rungs", rungs=10, students=8, headline=True),
    Design("optimum grows with tokens, 4 budgets", best=1.5, d=1.3, budgets=FOUR),
    Design("break-even, 2 budgets", best=2.0, d=1.3, budgets=TWO, headline=True),
    Design("break-even, 3 budgets", best=1.5, d=1.3, budgets=(1.0, 2.0, 4.0)),
)
NULLS = (
    Design("flat", best=None),
    Design("flat, 24 rungs, 1 seed", best=None, rungs=24, seeds=1),
    Design("falling", best=None, slope=-0.02),
    Design("rising", best=None, slope=0.02),
    Design("falls to a plateau", best=None, plateau=-1.0),
    Design("rises from a plateau", best=None, plateau=1.0),
    Design("a bad teacher in the middle", best=None, bad=4),
    Design("a bad largest teacher", best=None, bad=7),
    Design("rungs that misfit", Noise(0.008, 0.016, 0.006, 0.007, 0.010), best=None),
    Design("one order at all budgets", best=None, slope=-0.02, budgets=TWO),
    Design("slope that fades", best=None, slope=0.04, fade=-0.04 / math.log(4), budgets=TWO),
    Design("one budget noisier", best=None, budgets=TWO, noisy_budget=2.0),
    Design("teachers differ by budget", Noise(0.008, 0.004, 0.006, 0.016, 0.010), best=None, budgets=TWO),
)


def one(design: Design, seed: int) -> dict[str, Any]:
    """The model's results on one grid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = cells_of(design.table(np.random.default_rng([seed, sum(map(ord, design.name))])))
        joint = fit_cells(cells)
    low, high = ends(joint)
    found = joint.curve.optimum(0.0, 0.0)
    row: dict[str, Any] = {"claim": 1 - low.p_above() < ALPHA and high.p_above() < ALPHA}
    row["width"] = found.high - found.low if found.bounded else math.inf
    back = joint.means[1] - math.log(3e5) if len(design.budgets) > 1 else 0.0
    if design.best is not None:
        true = math.log(design.best) + joint.means[0] + design.d * back
        row["covers"] = found.low <= true <= found.high
        oracle = design.oracle(cells)
        row["oracle"] = oracle.high - oracle.low if oracle.bounded else math.inf
    if len(design.budgets) > 1:
        between = joint.curve.break_even(SMALL, LARGE, 0.0)
        row["break_even"] = between.bounded
        if design.best is not None and design.d:  # a parabola: equal where the optimum is halfway
            true = ((SMALL + LARGE) / 2 - math.log(design.best) - joint.means[0]) / design.d - back
            row["break_even_covers"] = between.low <= true <= between.high
    return row


def summary(design: Design, found: pd.DataFrame) -> dict[str, Any]:
    """A row of the table."""
    claims = int(found["claim"].sum())
    row: dict[str, Any] = {"design": design.name, "optimum": design.best is not None, "grids": len(found)}
    row |= {"claims": claims / len(found), "claims_upper": _upper(claims, len(found))}
    if design.best is not None:
        given = found["covers"][found["claim"]]
        row |= {"coverage": found["covers"].mean(), "coverage_lower": _lower(int(found["covers"].sum()), len(found))}
        row |= {"given": given.mean() if claims else math.nan, "open": np.isinf(found["width"]).mean()}
        row["oracle_open"] = np.isinf(found["oracle"]).mean()
        row["width"] = found["width"].median() / found["oracle"].median()
        both = np.isfinite(found["width"] + found["oracle"])
        row["width_bounded"] = (found["width"] / found["oracle"])[both].median()
    if "break_even" in found:
        established = int(found["break_even"].sum())
        row |= {"break_even_claims": established / len(found), "break_even_upper": _upper(established, len(found))}
        if "break_even_covers" in found:
            row["break_even_coverage"] = found["break_even_covers"].mean()
            row["break_even_given"] = found["break_even_covers"][found["break_even"]].mean()
    return row


def _lower(hits: int, of: int) -> float:
    return float(stats.beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0


def _upper(hits: int, of: int) -> float:
    return float(stats.beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0


def _one(given: tuple[Design, int]) -> dict[str, Any]:
    return one(*given)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, help="of each design (default: 2,000 of headlines and nulls, else 500)")
    parser.add_argument("--out", type=Path, help="where the table goes; designs that it has are not run again")
    given = parser.parse_args(words)
    known = pd.read_csv(given.out) if given.out and given.out.exists() else pd.DataFrame(columns=["design", "grids"])
    wanted = {d.name: given.grids or d.grids for d in (*DESIGNS, *NULLS)}
    rows = known[known["grids"] == known["design"].map(wanted)].to_dict("records")
    with ProcessPoolExecutor() as pool:
        for design in (*DESIGNS, *NULLS):
            if design.name in {row["design"] for row in rows}:
                continue
            asked = [(design, FIRST_SEED + i) for i in range(wanted[design.name])]
            rows.append(summary(design, pd.DataFrame(pool.map(_one, asked, chunksize=5))))
            print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)
            if given.out:
                pd.DataFrame(rows).to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
