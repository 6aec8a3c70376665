"""The ratio law `N_T* = r·N_S` over the located optima, beside the null that could have made it up.

A parabola through noise has a minimum somewhere, and on a grid of 1× to 8× that is at 2.9× on average: a ratio alone is
no evidence. So a law is claimed only if at least three students have interior optima *and* the curvature of the curves
beats a permutation of teachers within students.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit.frame import BY, Curve, curves
from capacity_gap.fit.optimum import LEAST_TEACHERS, Optimum, optima_of

LEAST_STUDENTS = 3
PERMUTATIONS = 999
LEVEL = 0.05

Pair = tuple[float, float] | None


@dataclass(frozen=True)
class LawFit:
    """The fit of a whole table. Estimates are None unless `status` is `law`.

    `status`: `law`; `no_optimum` (curves without a minimum that beats noise); `censored` (optima lie at or beyond the
    grid's ends); `too_few` (under three students). `ratio` is r of `N_T* = r·N_S`; `slope` is b of `N_T* ∝ N_S^b`
    (1 if the ratio is one constant); intervals are 95 %. `null_p`: share of permutations with as much curvature.
    """

    status: str
    ratio: float | None
    ratio_interval: Pair
    slope: float | None
    slope_interval: Pair
    axis: str
    optima: tuple[Optimum, ...]
    null_p: float | None
    without_outer_rungs: float | None  # the ratio when each curve's largest and smallest teacher are dropped
    notes: tuple[str, ...]

    def predict(self, student_params: float) -> float:
        """The best teacher's parameters for a student of `student_params`.

        Raises:
            ValueError: there is no law to predict from.
        """
        if self.ratio is None:
            raise ValueError(f"there is no law to predict from: status {self.status}. {self.verdict()}")
        return self.ratio * student_params

    def verdict(self) -> str:
        """What was found, in a sentence or two of plain English."""
        counts = Counter(o.status for o in self.optima)
        seen = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        curves = f"{len(self.optima)} curve{'s' if len(self.optima) != 1 else ''} ({seen})"
        if self.status == "law":
            assert self.ratio is not None and self.ratio_interval is not None
            low, high = self.ratio_interval
            return (
                f"The best teacher has {self.ratio:.2f}× the student's parameters (95 % interval {low:.2f} to "
                f"{high:.2f}), from {curves}; permuted data do as well in {self.null_p:.1%} of cases."
            )
        reasons = {
            "too_few": f"No law can be fitted: it takes at least {LEAST_STUDENTS} students, each under at least "
            f"{LEAST_TEACHERS} teachers. Here: {curves}.",
            "censored": f"No ratio is claimed: the optima lie at or beyond the ends of the grid. Here: {curves}. "
            "Extend the ladder on that side.",
            "no_optimum": f"No ratio is claimed: fewer than {LEAST_STUDENTS} curves have a minimum that stands out "
            f"from noise, or permuted data do as well. Here: {curves}.",
        }
        return reasons[self.status]

    def summary(self) -> str:
        """A table of the optima and the estimates, with the verdict."""
        lines = [
            f"Capacity-gap law, parameters: {self.axis}, status: {self.status}",
            f"{'student':>10} {'data':>10} {'init':>7} {'teachers':>8} {'status':>14} {'best teacher':>13} "
            f"{'95 % interval':>21} {'ratio':>6}",
        ]
        for o in self.optima:
            best = "–" if o.teacher_params is None else f"{o.teacher_params:,.0f}"
            low, high = ("…" if v is None else f"{v:,.0f}" for v in o.interval)
            ratio = "–" if o.ratio is None else f"{o.ratio:.2f}"
            tokens = "–" if o.data_tokens is None else f"{o.data_tokens:,}"
            lines.append(
                f"{o.student:>10} {tokens:>10} {o.init or '–':>7} {o.teachers:>8} {o.status:>14} {best:>13} "
                f"{low + ' to ' + high:>21} {ratio:>6}"
            )
        if self.slope is not None and self.slope_interval is not None:
            least, most = self.slope_interval
            lines.append(f"exponent b of N_T* ∝ N_S^b: {self.slope:.2f} ({least:.2f} to {most:.2f})")
        if self.without_outer_rungs is not None:
            lines.append(f"ratio without each curve's outer rungs: {self.without_outer_rungs:.2f}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes), "", self.verdict()])

    def to_json(self) -> str:
        """The whole fit as JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "LawFit":
        """Reads what `to_json` wrote."""
        given = json.loads(text)
        for name in ("ratio_interval", "slope_interval"):
            given[name] = None if given[name] is None else tuple(given[name])
        for o in given["optima"]:
            o["interval"], o["flat_interval"] = tuple(o["interval"]), tuple(o["flat_interval"])
        optima = tuple(Optimum(**o) for o in given.pop("optima"))
        return cls(**{**given, "optima": optima, "notes": tuple(given["notes"])})

    def save(self, file: Path) -> None:
        """Writes the JSON."""
        file.write_text(self.to_json() + "\n")


def fit_law(
    frame: pd.DataFrame, *, metric: str | None = None, axis: str = "total", by: Sequence[str] = BY, seed: int = 0
) -> LawFit:
    """Fits the ratio law to a table of runs; what is doubtful becomes a status, only what is impossible raises.

    Args:
        frame: tidy table, one row a run; needs `student_params, teacher_params` and `loss` (or `student_loss`).
        metric: the column to minimise, if another.
        axis: `total` or `non_embedding` parameters.
        by: columns that part curves.
        seed: of the permutations.
    """
    found, notes = curves(frame, metric=metric, axis=axis, by=by)
    return law_of(found, axis=axis, notes=notes, seed=seed)


def law_of(found: Sequence[Curve], *, axis: str, notes: Sequence[str] = (), seed: int = 0) -> LawFit:
    """`fit_law` on curves."""
    optima = optima_of(found)
    interior = [o for o in optima if o.status == "interior"]
    p = null_p_value([c for c in found if len(c.x) >= LEAST_TEACHERS], seed=seed)
    status = _status(found, optima, interior, p)
    ratio = ratio_interval = slope = slope_interval = None
    if status == "law":
        ratio, ratio_interval = _ratio(interior)
        slope, slope_interval = _exponent(interior)
    inner = _without_outer(found) if status == "law" else None
    return LawFit(status, ratio, ratio_interval, slope, slope_interval, axis, tuple(optima), p, inner, tuple(notes))


def _status(found: Sequence[Curve], optima: Sequence[Optimum], interior: Sequence[Optimum], p: float | None) -> str:
    students = {c.key["student"] for c in found if len(c.x) >= LEAST_TEACHERS}
    if len(students) < LEAST_STUDENTS:
        return "too_few"
    if len({o.student for o in interior}) >= LEAST_STUDENTS and p is not None and p <= LEVEL:
        return "law"
    edges = sum(o.status in ("left_edge", "right_edge") for o in optima)
    return "censored" if edges >= max(1, len(optima) / 2) else "no_optimum"


def null_p_value(found: Sequence[Curve], *, seed: int = 0, permutations: int = PERMUTATIONS) -> float | None:
    """How often teachers dealt at random to the same losses give as much convexity as was seen.

    The statistic is the sum over curves of `max(0, c)²/Var(c)`, c the quadratic coefficient. One random ranking of all
    teachers reorders every curve at once, so that one teacher's luck, shared by all students, is part of the null.
    """
    if not found:
        return None
    generator = np.random.default_rng(seed)
    teachers = np.unique(np.concatenate([c.teacher_params for c in found]))
    ranks = np.argsort(generator.random((permutations, len(teachers))), axis=1)
    seen, drawn = 0.0, np.zeros(permutations)
    for curve in found:
        contrast = _curvature_contrast(curve)
        mine = ranks[:, np.searchsorted(teachers, curve.teacher_params)]
        shuffled = np.argsort(np.argsort(mine, axis=1), axis=1)
        scale = curve.loss.std() or 1.0
        seen += max(0.0, float(contrast @ curve.loss) / scale) ** 2
        drawn += np.maximum(0.0, curve.loss[shuffled] @ contrast / scale) ** 2
    return float((1 + (drawn >= seen * (1 - 1e-12)).sum()) / (1 + permutations))


def _curvature_contrast(curve: Curve) -> np.ndarray:
    """Unit vector v with `v·loss` the quadratic coefficient over its standard error at unit noise [K]."""
    u = curve.x - curve.x.mean()
    q, _ = np.linalg.qr(np.stack([np.ones_like(u), u, u * u], axis=1))
    return q[:, 2] * np.sign(q[:, 2] @ (u * u))


def _ratio(interior: Sequence[Optimum]) -> tuple[float, Pair]:
    """Geometric mean of the students' ratios, its interval from their spread (t with n − 1 degrees of freedom)."""
    logs = np.log([o.ratio for o in interior if o.ratio])
    # The spread between students holds each optimum's own error, so it is the honest yardstick; the intervals of the
    # single optima bound it from below, lest three students agree by luck.
    own = [np.log(o.interval[1] / o.interval[0]) / (2 * 1.96) for o in interior if o.interval[0] and o.interval[1]]
    error = max(logs.std(ddof=1), float(np.mean(own)) if own else 0.0) / np.sqrt(len(logs))
    half = stats.t.ppf(0.975, len(logs) - 1) * error
    middle = float(logs.mean())
    return float(np.exp(middle)), (float(np.exp(middle - half)), float(np.exp(middle + half)))


def _exponent(interior: Sequence[Optimum]) -> tuple[float | None, Pair]:
    """b of `log N_T* = log r + b·log N_S`, by least squares."""
    x = np.log([o.student_params for o in interior])
    y = np.log([o.teacher_params for o in interior if o.teacher_params])
    if np.ptp(x) < 1e-9 or len(x) < LEAST_STUDENTS:
        return None, None
    line = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    return float(line.slope), (float(line.slope - half), float(line.slope + half))


def _without_outer(found: Sequence[Curve]) -> float | None:
    """The ratio from the same curves without their smallest and largest teachers, or None if too little is left."""
    inner = [
        Curve(c.key, c.student_params, c.teacher_params[1:-1], c.loss[1:-1], c.count[1:-1], c.within, c.within_df)
        for c in found
        if len(c.x) >= LEAST_TEACHERS + 2
    ]
    left = [o for o in optima_of(inner) if o.status == "interior"]
    return float(np.exp(np.mean(np.log([o.ratio for o in left if o.ratio])))) if len(left) >= 2 else None
