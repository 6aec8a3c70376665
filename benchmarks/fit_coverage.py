"""Claim: intervals cover, one-sided bounds hold, and data without an optimum yield no law.

    python -m benchmarks.fit_coverage [--grids 2000] [--out results/fit_coverage.csv]     about half an hour on one core

Designs are fixed here, before any result. Every grid: students a rung apart on one ladder of teachers, each under the
rungs from 1× to 8× its size; loss 3 + f(log N_T/N_S) + teacher-seed noise (shared by students) + a run's noise.
Coverage is that of intervals given for a claim (an interior optimum, a law). `width` is the median width of the
interval of log r over that of an oracle that is given the form, the noise and its structure (Fisher information at the
truth). `lower` is the 95 % Monte-Carlo lower bound (Clopper and Pearson) of a coverage, `upper` that of a claim's rate.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit.frame import Curve
from capacity_gap.fit.law import law_from
from capacity_gap.fit.law_fit import LawFit
from capacity_gap.fit.optimum import locate

SPAN = math.log(8.0)
R = 2.5
DEPTH = 0.05  # nats one unit of log scale from the optimum, for the symmetric form


def quadratic(z: np.ndarray) -> np.ndarray:
    return DEPTH * z * z


def linex(steepness: float) -> Callable[[np.ndarray], np.ndarray]:
    """Rises exponentially on one side, linearly on the other; the curvature of `quadratic` at the optimum."""
    if steepness == 0:
        return quadratic

    def form(z: np.ndarray) -> np.ndarray:
        return 2 * DEPTH / steepness**2 * (np.exp(steepness * z) - steepness * z - 1)

    return form


@dataclass(frozen=True)
class Design:
    """One kind of grid; `identifiable` says, beforehand, that its intervals must cover."""

    name: str
    form: Callable[[np.ndarray], np.ndarray]
    steepness: float | None = None  # of a `linex` form
    teachers: int = 7
    seeds: int = 3
    noise: float = 0.004
    luck: float = 0.0  # standard deviation of teacher-seed noise; names of designs seed their draws
    best: float = R  # true ratio; the null designs have none
    students: int = 4
    identifiable: bool = True
    bad: int | None = None  # a rung, counted from the ladder's end, that is badly trained

    @property
    def x(self) -> np.ndarray:
        """log ratio of the teachers of every student."""
        return np.linspace(0, SPAN, self.teachers)

    def draw(self, rng: np.random.Generator) -> list[Curve]:
        """The curves of one grid."""
        step = SPAN / (self.teachers - 1)
        luck = self.luck * rng.standard_normal(self.teachers + self.students)
        if self.bad is not None:
            luck[self.teachers + self.students - 2 - self.bad] += 0.05
        found = []
        for s in range(self.students):
            n = 50_000 * math.exp(s * step)
            runs = 3 + self.form(self.x - math.log(self.best)) + luck[s : s + self.teachers]
            runs = runs + self.noise * rng.standard_normal((self.seeds, self.teachers))
            means = runs.mean(0)
            found.append(
                Curve(
                    key={"student": f"{n:.0f}"},
                    student_params=n,
                    teacher_params=50_000 * np.exp(step * (s + np.arange(self.teachers))),
                    loss=means,
                    count=np.full(self.teachers, float(self.seeds)),
                    within=float(((runs - means) ** 2).sum()),
                    within_df=self.teachers * (self.seeds - 1),
                    clusters=tuple(f"{s + k}" for k in range(self.teachers)),
                )
            )
        return found

    def oracle(self) -> float:
        """Width of the oracle's 95 % interval of log r: unknown are r, each curve's level and depth, and where the form
        is asymmetric its one steepness."""
        z, h = self.x - math.log(self.best), 1e-5
        slope = (self.form(z + h) - self.form(z - h)) / (2 * h)
        J = np.zeros((self.students, self.teachers, 1 + 2 * self.students))
        same = np.zeros((self.students, self.teachers, self.teachers + self.students))
        for s in range(self.students):
            J[s, :, 0] = -slope
            J[s, :, 1 + s] = 1.0
            J[s, :, 1 + self.students + s] = self.form(z)
            same[s, np.arange(self.teachers), s + np.arange(self.teachers)] = 1.0
        if self.steepness is not None:
            bend = (linex(self.steepness + h)(z) - linex(self.steepness - h)(z)) / (2 * h)
            J = np.concatenate([J, np.broadcast_to(bend[None, :, None], (*J.shape[:2], 1))], axis=-1)
        flat, Z = J.reshape(-1, J.shape[-1]), same.reshape(-1, same.shape[-1])
        covariance = self.luck**2 * Z @ Z.T + self.noise**2 / self.seeds * np.eye(len(Z))
        information = flat.T @ np.linalg.solve(covariance, flat)
        if np.linalg.cond(information) > 1e12:  # a null design: there is no optimum
            return float("nan")
        return 2 * 1.96 * math.sqrt(np.linalg.inv(information)[0, 0])


def nothing(z: np.ndarray) -> np.ndarray:
    return np.zeros_like(z)


DESIGNS = (
    Design("symmetric", quadratic),
    Design("symmetric, 5 teachers", quadratic, teachers=5),
    Design("symmetric, 12 teachers, one seed", quadratic, teachers=12, seeds=1),
    Design("steeper to the right", linex(1.0), 1.0),
    Design("steeper to the left", linex(-1.0), -1.0),
    Design("steeper to the left, 12 teachers", linex(-1.0), -1.0, teachers=12),
    Design("luck of shared teachers", quadratic, luck=0.004),
    Design("luck of shared teachers, 12", quadratic, luck=0.004, teachers=12),
    Design("eight students", quadratic, students=8, luck=0.003),
    Design("noisy, one seed", quadratic, noise=0.015, seeds=1, identifiable=False),
    Design("much luck", quadratic, luck=0.012, identifiable=False),
    Design("strongly asymmetric", linex(-2.5), -2.5, teachers=12, identifiable=False),
    Design("best beyond the grid (12×)", quadratic, best=12.0, identifiable=False),
    Design("best below the grid (0.7×)", quadratic, best=0.7, identifiable=False),
)
NULLS = (
    Design("noise", nothing, noise=0.005),
    Design("noise, one seed", nothing, noise=0.005, seeds=1),
    Design("luck", nothing, luck=0.01),
    Design("falling", lambda z: -0.03 * z, luck=0.004),
    Design("rising", lambda z: 0.03 * z, luck=0.004),
    Design("falling to a plateau", lambda z: 0.05 * np.exp(-2 * (z + 0.9)), luck=0.003),
    Design("flat, the largest teacher bad", nothing, noise=0.005, bad=0),
    Design("flat, a middle teacher bad", nothing, noise=0.005, bad=4),
    Design("falling, the largest teacher bad", lambda z: -0.03 * z, bad=0),
)


def bound(hits: int, of: int, *, lower: bool) -> float:
    """One-sided 95 % Clopper–Pearson bound of a rate."""
    if of == 0:
        return float("nan")
    if lower:
        return float(stats.beta.ppf(0.05, hits, of - hits + 1)) if hits else 0.0
    return float(stats.beta.ppf(0.95, hits + 1, of - hits)) if hits < of else 1.0


def covers(interval: tuple[float | None, float | None], truth: float) -> bool:
    low, high = interval
    return (low is None or low <= truth) and (high is None or truth <= high)


def one(design: Design, rng: np.random.Generator) -> dict:
    """What one grid gives: claims, coverage, width."""
    law = law_from(locate(design.draw(rng)), axis="total")
    interior = [o for o in law.optima if o.status == "interior"]
    edges = [o for o in law.optima if o.status in ("left_edge", "right_edge")]
    row = {"law": law.status == "law", "interior": len(interior), "edges": len(edges)}
    row["optimum covers"] = sum(covers(o.interval, design.best * o.student_params) for o in interior)
    row["bound holds"] = sum(covers(o.interval, design.best * o.student_params) for o in edges)
    return row | _ratio(law, design)


def _ratio(law: LawFit, design: Design) -> dict:
    if law.ratio_interval is None:
        return {"ratio covers": False, "width": float("nan")}
    low, high = law.ratio_interval
    return {"ratio covers": low <= design.best <= high, "width": math.log(high / low) / design.oracle()}


def simulate(design: Design, grids: int, seed: int = 0) -> pd.DataFrame:
    """One row a grid."""
    rng = np.random.default_rng([seed, len(design.name), *design.name.encode()])
    return pd.DataFrame([one(design, rng) for _ in range(grids)])


def summarise(design: Design, rows: pd.DataFrame, *, null: bool) -> dict:
    """One row a design."""
    laws, interior, edges = (int(rows[c].sum()) for c in ("law", "interior", "edges"))
    row: dict = {"design": design.name, "kind": "null" if null else ("identifiable" if design.identifiable else "hard")}
    row |= {"grids": len(rows), "law claimed": laws / len(rows), "upper": bound(laws, len(rows), lower=False)}
    if null:
        return row
    hits = {name: int(rows[name].sum()) for name in ("optimum covers", "bound holds", "ratio covers")}
    for name, of in (("optimum", interior), ("bound", edges), ("ratio", laws)):
        hit = hits[{"optimum": "optimum covers", "bound": "bound holds", "ratio": "ratio covers"}[name]]
        row |= {
            f"{name}, of": of,
            f"{name} covers": hit / of if of else None,
            f"{name}, lower": bound(hit, of, lower=True),
        }
    return row | {"width": rows["width"].median()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=2000)
    parser.add_argument("--only", help="designs whose name holds this")
    parser.add_argument("--out", type=Path, help="CSV for the table")
    given = parser.parse_args()
    table = []
    for null, designs in ((False, DESIGNS), (True, NULLS)):
        for design in designs:
            if given.only is None or given.only in design.name:
                table.append(summarise(design, simulate(design, given.grids), null=null))
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in table[-1].items()}, flush=True)
    if given.out:
        pd.DataFrame(table).to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
